"""The streaming parser: like openai-harmony's on what is well formed, and never at a loss on what is not."""

import random
import re
from collections.abc import Iterable

import openai_harmony as oh
import pytest
from gptoss_launch.launch.harmony import Conversation, Delta, Message, StreamParser, render
from gptoss_launch.launch.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st


def to_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of text in which the spelling of a special token does mean the token."""
    parts = re.split(r"(<\|\w+\|>)", text)
    return [
        token_id
        for part in parts
        for token_id in ([tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part))
    ]


def parse(ids: Iterable[int], tokenizer: Tokenizer, **options) -> tuple[StreamParser, list[Delta]]:
    parser = StreamParser(tokenizer, **options)
    deltas = [delta for token_id in ids for delta in parser.feed(token_id)]
    deltas += parser.finish()
    assert_consistent(parser, deltas)
    return parser, deltas


def assert_consistent(parser: StreamParser, deltas: list[Delta]) -> None:
    """Deltas come as start, text*, end for each message in turn, and add up to the messages."""
    open_message: Delta | None = None
    texts: list[str] = []
    built: list[Message] = []
    for delta in deltas:
        assert delta.index == len(built)
        if delta.kind == "start":
            assert open_message is None
            open_message, texts = delta, []
            continue
        assert open_message is not None
        for field in ("role", "name", "channel", "recipient", "content_type"):
            assert getattr(delta, field) == getattr(open_message, field)
        if delta.kind == "text":
            assert delta.text
            texts.append(delta.text)
        else:
            assert delta.ended is not None
            content = "".join(texts)
            built.append(Message(delta.role, content, delta.name, delta.channel, delta.recipient, delta.content_type))
            open_message = None
    assert open_message is None
    assert built == parser.messages


# --- well formed

CONTENTS = (
    "",
    "4",
    "Hello, world.",
    "naïve 日本語 🇨🇭👩‍👩‍👧",
    '{"city": "Zürich"}',
    "<|end|> is text",
    "\n\n  x\n",
    "a\u0301",
)


def well_formed(rng: random.Random) -> Message:
    content = "".join(rng.choices(CONTENTS, k=rng.randint(0, 4)))
    kind = rng.choice(["answer", "call", "result", "user"])
    if kind == "answer":
        return Message("assistant", content, channel=rng.choice(["analysis", "commentary", "final"]))
    if kind == "call":
        to = rng.choice(["functions.get_weather", "python", "browser.search", "functions.größe"])
        content_type = rng.choice([None, "json", "<|constrain|>json", "code"])
        return Message("assistant", content, None, rng.choice(["analysis", "commentary"]), to, content_type)
    if kind == "result":
        name = rng.choice(["functions.get_weather", "python"])
        return Message("tool", content, name=name, channel="commentary", recipient="assistant")
    return Message("user", content)


def from_oracle(message: oh.Message) -> Message:
    content = "".join(part.text for part in message.content if isinstance(part, oh.TextContent))
    author = message.author
    return Message(author.role.value, content, author.name, message.channel, message.recipient, message.content_type)


@pytest.mark.parametrize("seed", range(100))
def test_well_formed_output_is_read_like_openai_harmony_reads_it(seed: int, true_tokenizer: Tokenizer, oracle) -> None:
    rng = random.Random(seed)
    wanted = [well_formed(rng) for _ in range(rng.randint(1, 5))]
    system = len(render(Conversation(()), true_tokenizer, for_completion=False))
    ids = render(Conversation(tuple(wanted)), true_tokenizer, for_completion=False)[system:]
    ours, theirs = StreamParser(true_tokenizer, prefix_role=None), oh.StreamableParser(oracle, None)
    deltas = []
    for token_id in ids:
        theirs.process(token_id)
        step = ours.feed(token_id)
        said = "".join(delta.text for delta in step)
        if said and all(delta.ended is None for delta in step):
            assert said == theirs.last_content_delta
            assert step[0].channel == theirs.current_channel
            assert step[0].recipient == theirs.current_recipient
        deltas += step
    deltas += ours.finish()
    assert_consistent(ours, deltas)
    assert ours.messages == wanted == [from_oracle(message) for message in theirs.messages]
    assert ours.repairs == 0


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        " to=functions.f<|channel|>commentary <|constrain|>json",
        " to=functions.f<|channel|>commentary<|constrain|>json",
        "assistant to=functions.f<|channel|>commentary <|constrain|>json",
    ],
)
def test_the_recipient_stands_before_or_after_the_channel(header: str, true_tokenizer: Tokenizer, oracle) -> None:
    ids = to_ids(header + '<|message|>{"a": 1}<|call|>', true_tokenizer)
    parser, deltas = parse(ids, true_tokenizer)
    theirs = oracle.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT)
    assert parser.messages == [from_oracle(message) for message in theirs]
    assert parser.messages[0].recipient == "functions.f"
    assert parser.messages[0].content_type == "<|constrain|>json"
    assert deltas[-1].ended == "call"
    assert parser.repairs == 0


@pytest.mark.parametrize(
    "stream",
    [  # openai/harmony#82
        "I must refuse<|end|><|start|>assistant<|channel|>analysis<|message|>We must<|end|>",
        "<|channel|>analysis I must refuse<|end|><|start|>assistant<|channel|>final<|message|>Sorry<|return|>",
        "... Use the tool.<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
    ],
)
def test_a_lost_message_token_is_read_like_openai_harmony_reads_it(
    stream: str, true_tokenizer: Tokenizer, oracle
) -> None:
    ids = to_ids(stream, true_tokenizer)
    parser, _ = parse(ids, true_tokenizer)
    theirs = oracle.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT, strict=False)
    assert parser.messages == [from_oracle(message) for message in theirs]
    assert parser.repairs == 1


# --- malformed, as models were seen to write it

ANSWER = "<|start|>assistant<|channel|>final<|message|>ok<|return|>"
OK = Message("assistant", "ok", channel="final")


def said(content: str, channel: str | None = None, **fields: str) -> Message:
    return Message("assistant", content, channel=channel, **fields)


RECORDED: dict[str, list[Message]] = {
    # openai/harmony#38
    "<|channel|>commentary ––commentary<|message|>x<|end|>": [said("––commentaryx", "commentary")],
    "<|channel|>analysis<|message|>a<|end|>–– commentary<|channel|>final<|message|>b<|return|>": [
        said("a", "analysis"),
        said("–– commentaryb", "final"),
    ],
    # openai/harmony#48, vllm#43408
    "<|channel|><|message|>x<|end|>" + ANSWER: [said("x"), OK],
    "<|start|>" + ANSWER: [OK],
    "<|channel|>analysis<|message|>a<|end|>364" + ANSWER: [said("a", "analysis"), said("364"), OK],
    # openai/harmony#60, vllm#22519, #50690
    "<|channel|>final<|message|>ok<|end|><|return|>": [OK],
    "<|channel|>final<|message|>ok<|return|><|return|><|end|><|endoftext|>": [OK],
    "<|channel|>analysis<|message|>a<|end|><|message|>b<|return|>": [said("a", "analysis"), said("b")],
    # vllm#51977: the recipient twice
    " to=functions.web-browsing<|channel|>commentary to=functions.web-browsing json<|message|>{}<|call|>": [
        said("{}", "commentary", recipient="functions.web-browsing", content_type="json")
    ],
    # tenstorrent/vllm#386
    "<|start|>assistantassistant<|channel|>final<|message|>ok<|return|>": [OK],
    # tilesprivacy/tiles#145
    "<|channel|>commentary to=functions.write <|constrain|>write: edit file.<|end|>" + ANSWER: [
        said("write: edit file.", "commentary", recipient="functions.write"),
        OK,
    ],
    "<|start|>bash<|channel|>final<|message|>x<|end|>": [said("bashx", "final")],
    # llama.cpp#27720, #21286
    "<|channel|>??<|end|>" + ANSWER: [said("??"), OK],
    "<|channel|>commentary 2?<|end|>" + ANSWER: [said("2?", "commentary"), OK],
    "<|channel|>commentary?commentary?<|message|>x<|end|>": [said("?commentary?x", "commentary")],
    "<|channel|>commentary to=assistant<|channel|>commentary?<|message|>x<|end|>": [
        said("?x", "commentary", recipient="assistant")
    ],
    "<|channel|>We should answer this with care<|end|>" + ANSWER: [said("We should answer this with care"), OK],
    # ai-dynamo/frontend-crates#236
    "<|channel|>final__HANDOFF__<|return|>": [said("__HANDOFF__", "final")],
    # llama.cpp#25321: no markup at all
    '{"a": 1}<|return|>': [said('{"a": 1}')],
    "assistant is here<|return|>": [said("assistant is here")],
    "": [],
    # marks lost or in the wrong place
    "<|channel|>analysis<|message|>a<|channel|>final<|message|>ok<|return|>": [said("a", "analysis"), OK],
    "<|channel|>analysis<|message|>a" + ANSWER: [said("a", "analysis"), OK],
    "<|channel|>final<|message|>o<|constrain|><|message|><|startoftext|>k<|return|>": [OK],
    "<|channel|>commentary to=functions.f<|call|>": [said("", "commentary", recipient="functions.f")],
    '<|channel|>commentary to=functions.f{"a": 1}<|call|>': [said('{"a": 1}', "commentary", recipient="functions.f")],
    "<|channel|>commentary functions.f json<|message|>{}<|call|>": [
        said("{}", "commentary", recipient="functions.f", content_type="json")
    ],
    "<|channel|>analysis code<|message|>1 + 1<|end|>": [said("1 + 1", "analysis", content_type="code")],
    "<|start|>assistantfinal<|message|>ok<|return|>": [OK],
    "<|channel|>thoughts<|channel|>final<|message|>ok<|return|>": [said("thoughtsok", "final")],
    "<|end|><|end|>" + ANSWER: [OK],
}
HARMLESS = {
    "",
    " to=functions.web-browsing<|channel|>commentary to=functions.web-browsing json<|message|>{}<|call|>",
}


@pytest.mark.parametrize("stream", RECORDED)
def test_recorded_bad_streams(stream: str, small_tokenizer: Tokenizer) -> None:
    parser, _ = parse(to_ids(stream, small_tokenizer), small_tokenizer)
    assert parser.messages == RECORDED[stream]
    assert (parser.repairs == 0) == (stream in HARMLESS)


@pytest.mark.parametrize("stream", RECORDED)
def test_recorded_bad_streams_in_the_true_vocabulary(stream: str, true_tokenizer: Tokenizer) -> None:
    parser, _ = parse(to_ids(stream, true_tokenizer), true_tokenizer)
    assert parser.messages == RECORDED[stream]


def test_a_tool_is_an_author_by_its_own_name(small_tokenizer: Tokenizer) -> None:
    stream = "<|start|>toolbox.search to=assistant<|channel|>commentary<|message|>found<|end|>"
    parser, _ = parse(to_ids(stream, small_tokenizer), small_tokenizer, prefix_role=None)
    assert parser.messages == [Message("tool", "found", "toolbox.search", "commentary", "assistant")]
    assert parser.repairs == 0


# --- what is cut short

WHOLE = (
    "<|channel|>analysis<|message|>thïnk<|end|>"
    '<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": "ü"}<|call|>'
)


def test_output_cut_anywhere_gives_the_beginning_of_the_whole(small_tokenizer: Tokenizer) -> None:
    ids = to_ids(WHOLE, small_tokenizer)
    whole, _ = parse(ids, small_tokenizer)
    assert [message.content for message in whole.messages] == ["thïnk", '{"a": "ü"}']
    for end in range(len(ids)):
        parser, deltas = parse(ids[:end], small_tokenizer)
        assert parser.repairs == 0
        for ours, full in zip(parser.messages, whole.messages, strict=False):
            assert full.content.startswith(ours.content.removesuffix("\ufffd"))  # cut inside a character
            assert (ours.channel, ours.recipient, ours.content_type) == (
                full.channel,
                full.recipient,
                full.content_type,
            )
        assert all(delta.ended in ("end", "unfinished") for delta in deltas if delta.kind == "end")


def test_a_call_whose_header_was_cut_is_not_delivered(small_tokenizer: Tokenizer) -> None:
    parser, deltas = parse(to_ids("<|channel|>commentary to=functions.f", small_tokenizer), small_tokenizer)
    assert parser.messages == [] and deltas == []


def test_the_parser_goes_on_after_finish(small_tokenizer: Tokenizer) -> None:
    parser = StreamParser(small_tokenizer)
    for _ in range(2):
        for token_id in to_ids("<|start|>assistant<|channel|>final<|message|>ok", small_tokenizer):
            parser.feed(token_id)
        assert parser.finish()[-1].ended == "unfinished"
        assert parser.finish() == []
    assert parser.messages == [OK, OK]


# --- at once, and in whole characters


def test_content_comes_token_by_token(small_tokenizer: Tokenizer) -> None:
    parser = StreamParser(small_tokenizer)
    *head, last = to_ids("<|channel|>final<|message|>", small_tokenizer)
    assert [parser.feed(token_id) for token_id in head] == [[]] * len(head)
    assert [delta.kind for delta in parser.feed(last)] == ["start"]
    for char in "Hello to=x {\n}":
        assert [delta.text for delta in parser.feed(small_tokenizer.encode(char)[0])] == [char]


def test_content_without_a_header_comes_as_soon_as_it_can_be_no_header(small_tokenizer: Tokenizer) -> None:
    parser = StreamParser(small_tokenizer)
    heard = [[delta.text for delta in parser.feed(token_id)] for token_id in small_tokenizer.encode("tomato")]
    assert heard == [[], [], ["", "tom"], ["a"], ["t"], ["o"]]  # "to" may become "to="
    parser = StreamParser(small_tokenizer)
    assert [delta.kind for delta in parser.feed(small_tokenizer.encode("H")[0])] == ["start", "text"]


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ('<|channel|>commentary to=functions.f {"', '{"'),
        ("<|channel|>final\nT", "T"),
        ("<|channel|>final The answer is", "The answer i"),
        ("<|start|>assistant The answer is", "The answer i"),
        ("<|channel|>commentary to=" + "x" * 600, ""),
    ],
)
def test_text_is_not_held_back_for_a_message_token_that_was_lost(
    small_tokenizer: Tokenizer, head: str, told: str
) -> None:
    """An answer without <|message|> must stream, not wait for its end."""
    parser = StreamParser(small_tokenizer)
    deltas = [delta for token_id in to_ids(head, small_tokenizer) for delta in parser.feed(token_id)]
    assert deltas[0].kind == "start"
    assert "".join(delta.text for delta in deltas).startswith(told)


def test_characters_are_not_cut(small_tokenizer: Tokenizer) -> None:
    text = "é日🇨🇭👩‍👩‍👧"
    ids = to_ids(f"<|channel|>final<|message|>{text}<|return|>", small_tokenizer)  # one byte a token
    _, deltas = parse(ids, small_tokenizer)
    assert [delta.text for delta in deltas if delta.kind == "text"] == list(text)


@pytest.mark.parametrize(("data", "wanted"), [(b"\xf0\x9f", "\ufffd"), (b"a\xffb", "a\ufffdb"), (b"\xc3", "\ufffd")])
def test_bytes_that_are_no_character_become_replacements(small_tokenizer: Tokenizer, data: bytes, wanted: str) -> None:
    by_byte = {small_tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    ids = [by_byte[bytes([byte])] for byte in data]
    head = to_ids("<|channel|>final<|message|>", small_tokenizer)
    for tail in ([], [small_tokenizer.special["<|return|>"]]):
        parser, _ = parse([*head, *ids, *tail], small_tokenizer)
        assert [message.content for message in parser.messages] == [wanted]


# --- anything at all

MARKS = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|call|>",
    "<|return|>",
    "<|endoftext|>",
)
FRAGMENTS = st.sampled_from(
    [*MARKS, *MARKS, "<|reserved_1|>", "assistant", "user", "functions.f to=assistant", " to=functions.f ", "json"]
    + ["analysis", "commentary", "final", "<|start|>assistant<|channel|>final<|message|>", " ", "\n", "{", "日"]
)
HYPOTHESIS = settings(max_examples=400, deadline=None, derandomize=True)


@HYPOTHESIS
@given(st.lists(st.one_of(FRAGMENTS, st.none()), max_size=30))
def test_every_word_is_delivered_whatever_is_around_it(small_tokenizer: Tokenizer, fragments: list[str | None]) -> None:
    """None stands for a word of its own, which must turn up: in a text, or as a name in a header."""
    words = [f"w{place}w" for place, fragment in enumerate(fragments) if fragment is None]
    stream = "".join(f"w{place}w" if fragment is None else fragment for place, fragment in enumerate(fragments))
    parser, deltas = parse(to_ids(stream, small_tokenizer), small_tokenizer)
    heard = "".join(
        "|".join(map(str, (delta.channel, delta.recipient, delta.content_type, delta.name, "")))
        if delta.kind == "start"
        else delta.text
        for delta in deltas
    )
    for word in words:
        assert word in heard


@HYPOTHESIS
@given(st.binary(max_size=60), st.integers(0, 60))
def test_every_byte_of_a_message_is_delivered(small_tokenizer: Tokenizer, data: bytes, stray: int) -> None:
    by_byte = {small_tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    ids = [by_byte[bytes([byte])] for byte in data]
    ids.insert(min(stray, len(ids)), small_tokenizer.special["<|constrain|>"])  # is dropped, and cuts nothing
    parser, _ = parse([*to_ids("<|channel|>final<|message|>", small_tokenizer), *ids], small_tokenizer)
    assert parser.messages == [said(data.decode("utf-8", "replace"), "final")]
    assert parser.repairs == 1


@HYPOTHESIS
@given(st.lists(st.integers(-3, 300), max_size=80), st.sampled_from([None, "assistant", "tool"]))
def test_no_token_is_an_error(small_tokenizer: Tokenizer, ids: list[int], prefix_role) -> None:
    parse([*ids, 10**12, -(10**12)], small_tokenizer, prefix_role=prefix_role)


@HYPOTHESIS
@given(st.data())
def test_a_mutilated_stream_is_no_error(small_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Tokens dropped, doubled and swapped in a good stream; the letters of the content all come through."""
    ids = to_ids(WHOLE + ANSWER, small_tokenizer)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(ids) - 1))
        ids[place : place + 1] = data.draw(st.sampled_from([[], [ids[place]] * 2, ids[place : place + 2][::-1]]))
    parser, deltas = parse(ids, small_tokenizer)
    heard = "".join(delta.text for delta in deltas)
    assert all(char in heard for char in "ïü" if char in small_tokenizer.decode(ids))
