"""A server of the OpenAI API as something to measure: ours, vLLM, SGLang, llama-server or another.

Prompts go as token ids to /v1/completions, with `ignore_eos` where that is taken, so that an answer has as many
tokens as were asked for. A server that does not take them is asked by words on /v1/chat/completions, and the rows say
so. Every prompt is new to the server, also where the same benchmark ran before: prefix caches find nothing.
"""

import json
import random
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ...parallel.errors import UserError
from .rows import About
from .target import Prompt, Room, Sample, id_range, random_ids
from .wire import Answer, BrokenError, ask, read_body, read_events, read_status

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCABULARIES = (190_000, 1000)  # token ids of gpt-oss; of a model for tests, where the last of those is refused
REFUSED = (400, 404, 405, 422, 501)  # what a server says to what it does not offer
ENGINES = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama-server", "gptoss-launch": "gptoss-launch"}
# by owned_by of /v1/models; where each tells its version: path and keys
VERSIONS = (("/version", ("version",)), ("/get_server_info", ("version",)), ("/props", ("build_info",)))
# Short words that are one token each, with the space before, in most vocabularies; in others more, which is measured.
WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an".split()
TRIAL_WORDS = 200

Route = Literal["/v1/completions", "/v1/chat/completions"]


@dataclass(frozen=True)
class Endpoint:
    """url: with no path; routes are below /v1. extra: what is sent besides, as this server takes it.

    ids: range of prompt tokens. salt: makes its prompts differ from those of every other run. fixed_tokens,
    word_tokens: a chat prompt of w words has about fixed + w * word tokens.
    """

    url: str
    key: str | None
    model: str  # as requests name it
    about: About
    room: Room
    route: Route
    extra: dict[str, Any]
    ids: tuple[int, int] = (0, 0)
    salt: int = 0
    fixed_tokens: float = 0.0
    word_tokens: float = 1.0
    notes: tuple[str, ...] = ()

    def prompt(self, tokens: int, draw: random.Random) -> Prompt:
        draw = random.Random(f"{self.salt} {draw.getrandbits(64)}")
        if self.route == COMPLETIONS:
            return Prompt(tokens, random_ids(tokens, self.ids, draw))
        words = max(1, round((tokens - self.fixed_tokens) / self.word_tokens))
        return Prompt(tokens, text=" ".join(draw.choices(WORDS, k=words)))

    def body(self, prompt: Prompt, new: int) -> bytes:
        asked: dict[str, Any] = {"model": self.model, "max_tokens": new, "temperature": 1.0, "stream": True}
        asked |= {"stream_options": {"include_usage": True}} | self.extra
        if self.route == COMPLETIONS:
            return json.dumps(asked | {"prompt": list(prompt.ids)}).encode()
        return json.dumps(asked | {"messages": [{"role": "user", "content": prompt.text}]}).encode()

    async def stream(self, prompt: Prompt, new: int) -> Sample:
        try:
            answer = await ask(self.url + self.route, self.body(prompt, new), self.key)
        except OSError as error:
            return Sample(0.0, 0.0, error=f"no connection: {error.strerror or error}")
        return read_sample(answer)


async def open_endpoint(url: str, key: str | None) -> Endpoint:
    """The server at `url`, found out about: its model, its name and version, and which way it can be asked.

    Raises UserError for one that does not answer as such a server does.
    """
    base = base_url(url)
    models = await _get(f"{base}/v1/models", key)
    try:
        model = models["data"][0]
        name, owner = str(model["id"]), str(model.get("owned_by", ""))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{url}: /v1/models names no model", "is it the URL of an OpenAI-compatible server?") from None
    context = model.get("max_model_len")
    shown = Path(name).name if name.startswith("/") else name  # a folder of that machine
    about = About(ENGINES.get(owner, owner or "unknown"), await _version(base, key), shown, route="")
    room = Room(context if isinstance(context, int) else None)
    first = Endpoint(base, key, name, about, room, COMPLETIONS, {"ignore_eos": True}, (0, 200), secrets.randbits(64))
    for extra in ({"ignore_eos": True}, {}):
        asked = replace(first, extra=extra)
        trial = await asked.stream(Prompt(3, (65, 66, 67)), 2)
        # one token more may be the server's own beginning of a text; ids read as text would be more
        if not trial.error and trial.prompt_tokens in (3, 4):
            return await _by_ids(asked)
        if trial.error and not _is_refusal(trial.error):
            raise UserError(f"{url}: {trial.error}", "the server must be ready, and idle")
    return await _by_words(replace(first, route=CHAT, extra={}))


async def _by_ids(endpoint: Endpoint) -> Endpoint:
    largest, least = VOCABULARIES
    trial = await endpoint.stream(Prompt(3, (65, 66, largest - 1)), 1)
    vocabulary = least if trial.error else largest
    ends = "" if endpoint.extra else "; the server takes no ignore_eos"
    about = replace(endpoint.about, route=f"{COMPLETIONS}, token ids{', ignore_eos' if endpoint.extra else ''}")
    notes = (f"the model may end an answer early{ends}",) if ends else ()
    return replace(endpoint, about=about, ids=id_range(vocabulary), notes=notes)


async def _by_words(endpoint: Endpoint) -> Endpoint:
    """How many tokens a prompt of words has is measured at two lengths."""
    counted = []
    for words in (1, 1 + TRIAL_WORDS):
        trial = await endpoint.stream(Prompt(words, text=" ".join(WORDS[i % len(WORDS)] for i in range(words))), 1)
        if trial.error:
            raise UserError(f"{endpoint.url}: {trial.error}", f"neither {COMPLETIONS} nor {CHAT} answers")
        counted.append(trial.prompt_tokens)
    if not counted[0]:
        raise UserError(f"{endpoint.url}: it does not count tokens", "stream_options.include_usage has to be answered")
    each = (counted[1] - counted[0]) / TRIAL_WORDS
    return replace(
        endpoint,
        about=replace(endpoint.about, route=f"{CHAT}, words"),
        fixed_tokens=counted[0] - each,
        word_tokens=each,
        notes=("asked by words, for the server takes no token ids: markup counts as tokens, and brings no piece",),
    )


def read_sample(answer: Answer) -> Sample:
    """What a streamed answer says of itself: times, counts, or why it is none."""
    sent_s = answer.sent_s
    last_s = answer.pieces[-1][0] if answer.pieces else sent_s
    try:
        status = read_status(answer.pieces)
        if status != 200:
            return Sample(sent_s, last_s, error=f"{status}: {_reason(answer)}")
    except BrokenError as broken:
        return Sample(sent_s, last_s, error=answer.lost or str(broken))
    events, fault = read_events(answer.pieces)
    came_s: list[float] = []
    tokens = prompt_tokens = 0
    ended_s, finished = sent_s, False
    for at_s, data in events:
        if data == b"[DONE]":
            continue
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                return Sample(sent_s, at_s, error=f"after {len(came_s)} pieces: {_message(chunk)}")
            if usage := chunk.get("usage"):
                tokens, prompt_tokens = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            for choice in chunk.get("choices") or ():
                if _brings(choice):
                    came_s.append(at_s)
                    ended_s = at_s
                if choice.get("finish_reason"):
                    finished, ended_s = True, at_s
        except (ValueError, KeyError, TypeError, AttributeError):
            return Sample(sent_s, at_s, error=f"an event that is no chunk of an answer: {data[:60]!r}")
    if not finished:
        return Sample(sent_s, last_s, error=f"cut off after {len(came_s)} pieces: {answer.lost or fault or 'no end'}")
    return Sample(sent_s, ended_s, tuple(came_s), tokens or len(came_s), prompt_tokens)


def _brings(choice: dict[str, Any]) -> bool:
    """Whether a choice of a chunk brings text. One of /v1/completions with none may be part of a character, which is a
    token all the same, unless it only tells the end."""
    if "text" in choice:
        return bool(choice["text"]) or not choice.get("finish_reason")
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _reason(answer: Answer) -> str:
    try:
        text = b"".join(data for _, data in read_body(answer.pieces)).decode(errors="replace")
        return _message(json.loads(text))
    except (BrokenError, ValueError, AttributeError):
        return "no reason given"


def _message(body: Any) -> str:
    """Of an error in OpenAI's shape, or in FastAPI's."""
    error = body.get("error", body.get("detail", body))
    said = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(said).split())[:200]


def _is_refusal(error: str) -> bool:
    return error.partition(":")[0] in map(str, REFUSED)


def base_url(url: str) -> str:
    """Without /v1 and what follows the host."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if not parts.hostname or port == -1 or parts.path.rstrip("/") not in ("", "/v1"):
        raise UserError(f"{url!r} is no URL of a server", "such as http://127.0.0.1:8000, with or without /v1")
    return f"{parts.scheme}://{parts.netloc}"


def is_local(url: str) -> bool:
    """Whether the server runs on this machine, as far as its URL tells."""
    return (urlsplit(url).hostname or "") in ("127.0.0.1", "localhost", "::1")


async def _get(url: str, key: str | None) -> Any:
    hint = "is it the URL of a running server?"
    try:
        answer = await ask(url, None, key)
        status = read_status(answer.pieces)
        if status != 200:
            raise UserError(f"{url}: {status}: {_reason(answer)}", hint if status != 401 else "--api-key-file FILE")
        return json.loads(b"".join(data for _, data in read_body(answer.pieces)))
    except (OSError, BrokenError, json.JSONDecodeError) as error:
        raise UserError(f"{url}: {error}", hint) from None


async def _version(base: str, key: str | None) -> str | None:
    for path, keys in VERSIONS:
        try:
            said = await _get(base + path, key)
        except UserError:
            continue
        for name in keys:
            if isinstance(said, dict) and isinstance(said.get(name), str):
                return said[name]
    return None
