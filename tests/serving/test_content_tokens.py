"""Which tokens are an answer's content: spelled out, they are the content, wherever headers and stop strings cut it."""

import random

import pytest
from gptoss_launch.launch.api.answer import Answer, Content
from gptoss_launch.launch.api.content_tokens import ContentToken, ContentTokens
from gptoss_launch.launch.harmony import StreamParser
from gptoss_launch.launch.plain_text import PlainText


def said(parser, tokens, stops=()):
    """The pieces of content that these tokens make; each token's log probability is its place."""
    answer = Answer(parser, stops, ["f"], keep_tokens=True)
    pieces = []
    for place, token in enumerate(tokens):
        pieces += answer.feed(token, float(place))
        if answer.stopped:
            break
    return [piece for piece in [*pieces, *answer.finish("length")] if isinstance(piece, Content)]


def check(tokenizer, tokens, pieces, whole_characters):
    shown = 0
    for piece in pieces:
        assert all(shown <= token.offset < shown + len(piece.text) for token in piece.tokens)
        shown += len(piece.text)
    content = "".join(piece.text for piece in pieces)
    kept = [token for piece in pieces for token in piece.tokens]
    places = [int(token.logprob) for token in kept]
    assert places == sorted(set(places)) and [token.id for token in kept] == [tokens[place] for place in places]
    if whole_characters:  # then each one's text stands where it says, and nothing is left over
        spelled = [tokenizer.decode([token.id]) for token in kept]
        assert [token.offset for token in kept] == [sum(map(len, spelled[:at])) for at in range(len(kept))]
        assert "".join(spelled[:-1]) == content[: kept[-1].offset if kept else 0]
        assert "".join(spelled).startswith(content)
    return content, kept


@pytest.fixture(scope="module")
def words(tokenizer):
    """Tokens that are whole characters."""
    return [id for id in range(1000) if "\ufffd" not in tokenizer.decode([id])]


@pytest.mark.parametrize("seed", range(40))
def test_without_a_header(seed, tokenizer, words):
    draw = random.Random(seed)
    whole = seed % 2 == 0
    tokens = [draw.choice(words) if whole else draw.randrange(1000) for _ in range(60)]
    stops = [draw.choice("etaoin") + draw.choice("rshdlu")] if seed % 3 == 0 else []
    for parser in (StreamParser(tokenizer), PlainText(tokenizer)):
        content, kept = check(tokenizer, tokens, said(parser, tokens, stops), whole)
        # A word that was taken for the assistant's header is dropped; the plain text has every token.
        if not any(stop in tokenizer.decode(tokens) for stop in stops) and isinstance(parser, PlainText):
            assert len(kept) == len(tokens) and content == tokenizer.decode(tokens)


@pytest.mark.parametrize("seed", range(40))
def test_conversations(seed, tokenizer, markup, words):
    """Reasoning, a preamble and an answer, well formed, in characters of any width."""
    draw = random.Random(seed)
    texts = ["".join(draw.choice("a é漢😀\n{}to=") for _ in range(20)) for _ in range(3)]
    channels = ("analysis", "commentary", "final")
    parts = [f"<|channel|>{channel}<|message|>{text}" for channel, text in zip(channels, texts, strict=True)]
    tokens = markup("<|end|><|start|>assistant".join(parts) + "<|return|>")
    pieces = said(StreamParser(tokenizer), tokens)
    content, kept = check(tokenizer, tokens, pieces, whole_characters=False)
    assert content == texts[1] + texts[2]
    assert [token.id for token in kept] == tokenizer.encode(texts[1]) + tokenizer.encode(texts[2])
    for at, token in enumerate(kept):
        before = b"".join(tokenizer.token_bytes(one.id) for one in kept[:at])
        assert token.offset == len(before.decode(errors="ignore"))
    # cut by a stop string anywhere, also within a token
    stop = content[draw.randrange(len(content) - 3) :][:3]
    content, cut = check(tokenizer, tokens, said(StreamParser(tokenizer), tokens, [stop]), whole_characters=False)
    assert content == (texts[1] + texts[2]).partition(stop)[0]
    assert cut == kept[: len(cut)] and all(token.offset >= len(content) for token in kept[len(cut) :])


@pytest.mark.parametrize("seed", range(40))
def test_any_tokens(seed, tokenizer):
    draw = random.Random(seed)
    special = list(tokenizer.special.values())
    tokens = [draw.choice(special) if draw.random() < 0.2 else draw.randrange(1000) for _ in range(300)]
    check(tokenizer, tokens, said(StreamParser(tokenizer), tokens), whole_characters=False)


def test_text_taken_for_a_header_has_its_tokens(tokenizer, markup):
    """`assistant` once more is header, and so is a word of it; what follows begins the answer, in the same step."""
    for text in ("to be or not", "assistant: yes", "it is {", ": colon first"):
        tokens = markup(text)
        content, kept = check(tokenizer, tokens, said(StreamParser(tokenizer), tokens), whole_characters=False)
        assert content and b"".join(tokenizer.token_bytes(token.id) for token in kept).decode().endswith(content)


def test_a_token_that_is_half_header():
    """Its text begins where the answer does."""

    class Parser:
        opening = b""

        def text_bytes(self, token_id):
            return (b"header", b"wordabc", "dé".encode(), b"f")[token_id]

    parser = Parser()
    tokens = ContentTokens(parser)
    for place in range(3):
        tokens.token(ContentToken(place, -1.0, ()), None)
    parser.opening = "abcdé".encode()
    tokens.begin("content")
    tokens.say("abcdé")
    tokens.token(ContentToken(3, -1.0, ()), "content")
    tokens.say("f")
    assert [(token.id, token.offset) for token in tokens.show("abcdéf")] == [(1, 0), (2, 3), (3, 5)]


def test_a_token_that_stops_unseen_is_counted_and_not_said(tokenizer, markup):
    answer = Answer(StreamParser(tokenizer), [], [], keep_tokens=True)
    for token in markup("<|channel|>final<|message|>Hi"):
        answer.feed(token, -1.0)
    answer.stop_unseen()
    [end] = answer.finish("stop")
    assert (end.finish_reason, end.completion_tokens) == ("stop", len(markup("<|channel|>final<|message|>Hi")) + 1)
