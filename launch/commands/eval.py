"""`eval MODEL or URL`: how many answers of a file of conversations a model gives right, through the API that serves it.

Each record is one as finetune reads it; its last assistant message is what is wanted, and all before it is the prompt.
"""

import json as json_text
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from ...parallel.errors import UserError
from ..served import served

AT_ONCE = 8  # requests
ANSWER_S = 600.0
WRONG_SHOWN = 5


@dataclass(frozen=True)
class Score:
    """Of `count` answers: right; with reasoning before the answer; ended by the model itself. wrong: the first few."""

    model: str
    task: str
    count: int
    right: int
    reasoned: int
    stopped: int
    wrong: tuple[dict[str, Any], ...]


@click.command
@click.argument("model")
@click.option("--task", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Conversations, in JSONL.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of an answer.")
@click.option("--json", is_flag=True, help="One JSON object on stdout, nothing else there.")
def command(model: str, task: Path, max_tokens: int, json: bool) -> None:
    """Count right answers, exactly as wanted in the final channel, at temperature 0.

    MODEL is what serve takes, or the URL of a server, such as http://127.0.0.1:8000/v1. A wanted tool call is right if
    the function and its arguments are.
    """
    requests = list(read_task(task, max_tokens))
    if not requests:
        raise UserError(f"{task}: no record in it", "a line of JSON for each, as finetune reads them")
    with served(model) as url, ThreadPoolExecutor(AT_ONCE) as pool:
        name = ask(f"{url}/models", None)["data"][0]["id"]
        asked = pool.map(lambda one: ask(f"{url}/chat/completions", one[0] | {"model": name}), requests)
        answers = list(shown(asked, len(requests)))
    score = count(model, task, requests, [answer["choices"][0] for answer in answers])
    if json:
        click.echo(json_text.dumps(asdict(score)))
        return
    click.echo(
        f"{score.right} of {score.count} right, {score.reasoned} reasoned, {score.stopped} stopped by themselves"
    )
    for one in score.wrong:
        click.echo(f"wanted {one['wanted']!r}, got {one['got']!r}: {one['asked']}")


def shown(answers: Iterable[Any], total: int) -> Iterator[Any]:
    """The answers, counted in a bar on stderr, in a terminal only, that leaves nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for answer in answers:
            bar.advance(task)
            yield answer


def read_task(task: Path, max_tokens: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """(body of a request, what is wanted) of every record. Raises UserError that names file and line."""
    from ..conversations import RecordError, api_messages, api_tools, prompt_and_completion
    from ..records import Source, read_records

    for record in read_records(Source(str(task))):
        try:
            if record.fields is None:
                raise RecordError(record.fault)
            plain = record.fields.get("messages")
            if plain is None and {"prompt", "completion"} <= record.fields.keys():
                plain, _ = prompt_and_completion(record.fields)
            messages, _ = api_messages(plain)
            if messages[-1].get("role") != "assistant":
                raise RecordError("the last message is no assistant's: there is nothing wanted")
            if not said(messages[-1]):  # it would be what a model says that is cut while it reasons
                raise RecordError("the last message says nothing: there is nothing wanted")
            body: dict[str, Any] = {"messages": messages[:-1], "max_completion_tokens": max_tokens, "temperature": 0}
            if "reasoning_effort" in record.fields:
                body["reasoning_effort"] = record.fields["reasoning_effort"]
            if record.fields.get("tools"):
                body["tools"] = api_tools(record.fields["tools"])
        except RecordError as error:
            raise UserError(f"{record.where}: {error}", "records are those that finetune reads") from None
        yield body, said(messages[-1])


def said(message: dict[str, Any]) -> Any:
    """What counts of an assistant's message: its text, or the function that it calls with its arguments."""
    calls = message.get("tool_calls")
    if not calls:
        content = message.get("content") or ""
        if isinstance(content, list):  # parts, as the API takes them
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        return str(content).strip()
    function = calls[0]["function"]
    try:
        return [function["name"], json_text.loads(function["arguments"])]
    except ValueError:
        return [function["name"], function["arguments"]]


def count(model: str, task: Path, requests: list[tuple[dict[str, Any], Any]], choices: list[dict[str, Any]]) -> Score:
    wrong = [
        {"asked": body["messages"][-1].get("content"), "wanted": wanted, "got": said(choice["message"])}
        for (body, wanted), choice in zip(requests, choices, strict=True)
        if said(choice["message"]) != wanted
    ]
    return Score(
        model=model,
        task=str(task),
        count=len(choices),
        right=len(choices) - len(wrong),
        reasoned=sum(bool(choice["message"].get("reasoning_content")) for choice in choices),
        stopped=sum(choice["finish_reason"] in ("stop", "tool_calls") for choice in choices),
        wrong=tuple(wrong[:WRONG_SHOWN]),
    )


def ask(url: str, body: dict[str, Any] | None) -> Any:
    """JSON of a GET, or of a POST of `body`. Raises UserError for a server that does not answer so."""
    data = None if body is None else json_text.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            return json_text.loads(response.read())
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {error.code}: {error.read(300).decode(errors='replace')}", "is it an API?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: {error}", "is it the URL of a running server, with /v1 at its end?") from None
