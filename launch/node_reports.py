"""What the doctors of several nodes tell each other: every node reports to the first one, and hears what sets it apart.

A node that reports has reached the head, by the very way that serving takes. Knows checks and connections; does not
know what a machine is made of.
"""

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from .handshake import HandshakeError, admit, introduce
from .listen import bind
from .nodes import HEAD_HINT, Nodes

AGAIN_S = 1.0  # between attempts to reach the head
REPORT_LIMIT_S = 120.0  # for the slowest node, after the first one is done
VERDICT_LIMIT_S = 600.0  # for the first one to be done


@dataclass(frozen=True)
class Check:
    """One line. hint: what to do; "" where nothing is."""

    name: str
    found: str
    wanted: str
    ok: bool
    hint: str


@dataclass(frozen=True)
class Report:
    """Of one node. equal: what has to be the same on all nodes, by name. bad: names of its own checks that failed."""

    rank: int
    host: str
    equal: dict[str, str]
    bad: tuple[str, ...]


def compare(reports: Mapping[int, Report]) -> dict[int, list[Check]]:
    """For each node, what it has and most have not; of camps of one size that of the lowest rank is right."""
    ordered = [reports[rank] for rank in sorted(reports)]
    names = dict.fromkeys(name for report in ordered for name in report.equal)
    most = {name: Counter(report.equal.get(name, "nothing") for report in ordered).most_common(1)[0] for name in names}
    verdicts: dict[int, list[Check]] = {}
    for report in ordered:
        odd = [name for name in names if report.equal.get(name, "nothing") != most[name][0]]
        verdicts[report.rank] = [
            Check(
                f"{name} on all nodes",
                report.equal.get(name, "nothing"),
                f"{most[name][0]}, as {most[name][1]} of {len(reports)} nodes have",
                False,
                "the same on every node",
            )
            for name in odd
        ] or [Check("versions on all nodes", f"equal on {len(reports)}", "equal", True, "")]
    return verdicts


async def report_to_head(nodes: Nodes, report: Report, limit_s: float = REPORT_LIMIT_S) -> list[Check]:
    """What the head makes of this node, or why it is not reached."""
    wanted, hint = f"{nodes.head} answers", f"is node 0 up, and port {nodes.port} open to this node?"
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            began_s = time.monotonic()
            reader, writer = await asyncio.wait_for(asyncio.open_connection(nodes.host, nodes.port), limit_s)
            try:
                await introduce(reader, writer, nodes.key, json.dumps(asdict(report)).encode())
                reached = Check("head", f"answers in {(time.monotonic() - began_s) * 1e3:.1f} ms", wanted, True, "")
                verdict = await asyncio.wait_for(reader.read(), VERDICT_LIMIT_S)
                return [reached, *(Check(**fields) for fields in json.loads(verdict))]
            finally:
                writer.close()
        except HandshakeError as error:
            return [Check("head", str(error), wanted, False, "every node needs the same --node-key-file")]
        except (OSError, EOFError, ValueError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else str(error)
        if time.monotonic() >= deadline_s:
            return [Check("head", reason, wanted, False, hint)]
        await asyncio.sleep(AGAIN_S)


class Collection:
    """The first node's side. Reports are taken in from the start, while it still looks at itself."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._reports: dict[int, Report] = {}
        self._verdicts: asyncio.Future[dict[int, list[Check]]] = asyncio.get_running_loop().create_future()
        self._waiting: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Raises UserError if the head's address is not one of this node."""
        listener = bind(self._nodes.host, self._nodes.port, HEAD_HINT)
        self._server = await asyncio.start_server(self._take, sock=listener)

    async def close(self, own: Report, limit_s: float = REPORT_LIMIT_S) -> list[Check]:
        """What sets this node apart, and how each other one is, once all have reported or limit_s has passed."""
        self._reports[own.rank] = own
        deadline_s = time.monotonic() + limit_s
        while len(self._reports) < self._nodes.count and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        verdicts = compare(self._reports)
        self._verdicts.set_result(verdicts)
        self._server.close()
        while self._waiting:
            await asyncio.sleep(0.01)
        others = [self._other(rank, verdicts, limit_s) for rank in range(self._nodes.count) if rank != own.rank]
        return [*verdicts[own.rank], *others]

    def _other(self, rank: int, verdicts: Mapping[int, list[Check]], limit_s: float) -> Check:
        if rank not in self._reports:
            hint = f"what does its own doctor say? port {self._nodes.port} of {self._nodes.host} must be open to it"
            return Check(f"node {rank}", f"no report in {limit_s:g} s", "fit", False, hint)
        report = self._reports[rank]
        bad = [*report.bad, *(check.name for check in verdicts[rank] if not check.ok)]
        found = f"{report.host}: {', '.join(bad)}" if bad else report.host
        return Check(f"node {rank}", found, "fit", not bad, f"put it right there, or --exclude={report.host}")

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._waiting.add(writer)
        try:
            fields = json.loads(await admit(reader, writer, self._nodes.key))
            report = Report(**fields | {"bad": tuple(fields["bad"])})
            verdict = await self._verdict(report)
            writer.write(json.dumps([asdict(check) for check in verdict]).encode())
            await writer.drain()
        except (HandshakeError, OSError, EOFError, ValueError):
            pass  # a stranger, or gone
        finally:
            writer.close()
            self._waiting.remove(writer)

    async def _verdict(self, report: Report) -> Sequence[Check]:
        if not 0 < report.rank < self._nodes.count or report.rank in self._reports:
            there = report.rank in self._reports or report.rank == 0
            found = f"node {report.rank} {'is there already' if there else f'of {self._nodes.count}'}"
            return [Check("node rank", found, "one node for each rank", False, "each needs a --node-rank of its own")]
        self._reports[report.rank] = report
        return (await asyncio.shield(self._verdicts))[report.rank]


async def with_other_nodes(
    nodes: Nodes, look: Callable[[], tuple[list[Check], dict[str, str]]], limit_s: float = REPORT_LIMIT_S
) -> list[Check]:
    """The checks of this node that `look` makes, and those that concern the others. look: (checks, what has to be equal
    on all nodes)."""
    collection = Collection(nodes) if nodes.rank == 0 else None
    if collection is not None:
        await collection.open()
    checks, equal = await asyncio.to_thread(look)
    bad = tuple(check.name for check in checks if not check.ok)
    report = Report(nodes.rank, socket.gethostname(), equal, bad)
    if collection is not None:
        return [*checks, *await collection.close(report, limit_s)]
    return [*checks, *await report_to_head(nodes, report, limit_s)]
