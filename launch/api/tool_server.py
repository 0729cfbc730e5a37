"""Tool servers: where gpt-oss's built-in tools, python and browser, are run. They speak MCP (modelcontextprotocol.io).

A server offers `browser` if it has the tools search, open and find, and `python` if it has the tool python, which is
given the code: those of https://github.com/openai/gpt-oss (gpt-oss-mcp-server) do. Each answer has sessions of its own,
since a notebook and a browser remember what was done in them. Knows nothing of harmony, of requests or of HTTP routes.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ...parallel.errors import UserError

FUNCTIONS: Mapping[str, tuple[str, ...]] = {"python": ("python",), "browser": ("search", "open", "find")}
FIND_S = 20.0  # a server has so long to say what it offers
CALL_S = 120.0  # and to answer a call: gpt-oss was told so of its notebook
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What a tool said. failed: it could not do what it was asked, and says why."""

    text: str
    failed: bool


class ToolServers:
    """homes: of each built-in tool that is offered, its server: a URL, or what else `mcp.Client` connects to."""

    def __init__(self, homes: Mapping[str, Any]) -> None:
        self._homes = homes

    @property
    def offered(self) -> frozenset[str]:
        return frozenset(self._homes)

    def session(self) -> "Session":
        """For one answer."""
        return Session(self._homes)


async def find_tools(servers: Sequence[Any]) -> ToolServers:
    """Asks each server what it offers. Raises UserError for one that cannot be reached or offers neither tool."""
    homes: dict[str, Any] = {}
    for server in servers:
        try:
            names = await asyncio.wait_for(_names(server), FIND_S)
        except Exception as error:
            hint = "the URL of an MCP server, /mcp included"
            raise UserError(f"--tool-server {server}: {_reason(error)}", hint) from None
        found = [tool for tool, functions in FUNCTIONS.items() if names.issuperset(functions)]
        if not found:
            has = ", ".join(sorted(names)) or "no tool"
            wanted = "; ".join(f"for {tool} {', '.join(functions)}" for tool, functions in FUNCTIONS.items())
            raise UserError(f"--tool-server {server}: it offers {has}", f"wanted are {wanted}")
        for tool in found:
            homes.setdefault(tool, server)
    return ToolServers(homes)


class Session:
    """Use as `async with`. Connects to a server when it is first needed."""

    def __init__(self, homes: Mapping[str, Any]) -> None:
        self._homes = homes
        self._open: dict[str, _Connection] = {}

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._open.values():
            await connection.close()

    async def run(self, name: str, text: str) -> Output:
        """name: python, or browser.search and so on. text: the code, or a JSON object. Whatever goes wrong is told to
        the model: it may try something else."""
        tool, _, function = name.partition(".")
        function = function or tool
        if function not in FUNCTIONS[tool]:
            return Output(f"error: {tool} has no function {function}", failed=True)
        arguments: Any = {"code": text}
        if tool != "python":
            try:
                arguments = json.loads(text or "{}")
            except ValueError as error:
                return Output(f"error: {name} takes a JSON object: {error}", failed=True)
            if not isinstance(arguments, dict):
                return Output(f"error: {name} takes a JSON object", failed=True)
        if tool not in self._open:
            self._open[tool] = _Connection(self._homes[tool])
        try:
            return await self._open[tool].call(function, arguments)
        except Exception as error:
            _LOG.warning("tool %s: %s", name, _reason(error))
            return Output(f"error: {name}: {_reason(error)}", failed=True)


class _Connection:
    """To one server, in a task of its own: mcp wants to be left in the task that entered it, and an answer may be
    closed from another one."""

    def __init__(self, server: Any) -> None:
        self._asked: asyncio.Queue[tuple[str, dict[str, Any], asyncio.Future[Output]]] = asyncio.Queue()
        self._serving = asyncio.create_task(self._serve(server))

    async def call(self, function: str, arguments: dict[str, Any]) -> Output:
        """Raises what goes wrong on the way."""
        answer: asyncio.Future[Output] = asyncio.get_running_loop().create_future()
        self._asked.put_nowait((function, arguments, answer))
        await asyncio.wait({answer, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self._serving.result()
            raise ConnectionError("the server ended the session")
        return answer.result()

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)

    async def _serve(self, server: Any) -> None:
        from mcp import Client  # here: it takes a second, and most servers have no tools

        async with Client(server, read_timeout_seconds=CALL_S) as client:
            while True:
                function, arguments, answer = await self._asked.get()
                try:
                    said = await client.call_tool(function, arguments)
                    texts = [part.text for part in said.content if part.type == "text"]
                    told = Output("\n".join(texts), bool(said.is_error))
                except Exception as error:
                    answer.set_exception(error)
                else:
                    answer.set_result(told)


async def _names(server: Any) -> set[str]:
    from mcp import Client

    async with Client(server) as client:
        return {tool.name for tool in (await client.list_tools()).tools}


def _reason(error: BaseException) -> str:
    """In a line. What goes wrong in a task group comes as a group of one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
