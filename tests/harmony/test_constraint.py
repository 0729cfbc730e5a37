"""What an answer is held to, in harmony: headers are those that prompts have, and openai-harmony reads what comes
out.
"""

import json
import random

import jsonschema
import numpy as np
import pytest
from bounded_schemas import BOUNDED, thing
from gptoss_launch.launch.api.constraint import Format, Named, Offered, constraint_for
from gptoss_launch.launch.harmony import Message, StreamParser, render_message
from gptoss_launch.launch.tokenizer import Tokenizer
from gptoss_launch.parallel.engine.constraint import Constraint
from gptoss_launch.parallel.engine.grammars import Text, Vocabulary
from gptoss_launch.parallel.engine.matcher import Structure

CITY = thing({"city": {"type": "string", "maxLength": 12}})
TOOLS = (Offered("get", None, False, ""), Offered("get_weather", CITY, True, ""), Offered("get-it_2", {}, False, ""))


def spelled(demand: Constraint, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(header) for section in demand.sections for header in section.headers]


def test_what_is_allowed(small_tokenizer) -> None:
    def headers(*demand, **more) -> list[str]:
        made = constraint_for(small_tokenizer, *demand, **more)
        return [] if made is None else spelled(made, small_tokenizer)

    def call(name: str) -> list[str]:
        to, tail = f" to=functions.{name}", " <|constrain|>json<|message|>"
        return [f"<|channel|>commentary{to}{tail}", f"{to}<|channel|>commentary{tail}"]

    think, say, answer = (f"<|channel|>{name}<|message|>" for name in ("analysis", "commentary", "final"))
    calls = [header for tool in TOOLS for header in call(tool.name)]
    loose = (TOOLS[0],)
    form = Format(CITY, True, "")
    assert headers() == headers(loose) == headers(TOOLS, "none") == []
    assert headers(TOOLS) == [think, *calls, say, answer]
    assert headers(TOOLS, "required") == headers(TOOLS, "required", form, 5) == [think, *calls]
    assert headers(TOOLS, Named("get")) == [think, *call("get")]
    assert headers(loose, response_format=form) == [think, *call("get"), say, answer]
    assert headers(response_format=form) == headers(max_reasoning_tokens=0) == [think, answer]
    assert headers(TOOLS, "none", max_reasoning_tokens=9) == [think, answer]


@pytest.mark.parametrize("name", [tool.name for tool in TOOLS])
def test_headers_are_those_of_prompts(true_tokenizer, name) -> None:
    demand = constraint_for(true_tokenizer, TOOLS)
    assert demand is not None
    headers = {header for section in demand.sections for header in section.headers}
    head = (true_tokenizer.special["<|start|>"], *true_tokenizer.encode("assistant"))
    assert demand.opening == head
    call = {"channel": "commentary", "recipient": f"functions.{name}", "content_type": "<|constrain|>json"}
    for fields in ({"channel": "analysis"}, {"channel": "commentary"}, {"channel": "final"}, call):
        ids = tuple(render_message(Message("assistant", "", **fields), true_tokenizer))
        assert ids[: len(head)] == head and ids[len(head) : -1] in headers


def drawn(demand: Constraint, vocabulary: Vocabulary, luck: random.Random) -> list[int]:
    """An answer of tokens at random, markup preferred, so that it comes to an end."""
    compiled = {one.grammar: vocabulary.compile(one.grammar) for one in demand.sections if one.grammar}
    structure = Structure(
        demand, vocabulary.alphabet, lambda one: Text(compiled[one.grammar].deep_copy()) if one.grammar else None
    )
    ends = {end for section in demand.sections for end in section.ends}
    stops = {section.ends[0] for section in demand.sections if section.grammar}
    ids: list[int] = []
    while len(ids) < 500:
        bits = np.unpackbits(np.frombuffer(structure.allowed(), np.uint8), bitorder="little")
        allowed = [token for token in ends if bits[token]] if luck.random() < 0.2 else []
        ids.append(luck.choice(allowed or bits.nonzero()[0].tolist()))
        if ids[-1] in stops:
            return ids
        structure.accept(ids[-1])
    raise AssertionError("no end")


@pytest.mark.slow
def test_openai_harmony_reads_what_comes_out(true_tokenizer, true_tokenizer_folder, oracle) -> None:
    import openai_harmony as oh

    vocab = 201_088
    vocabulary = Vocabulary(true_tokenizer_folder, vocab)
    special = set(true_tokenizer.special.values())
    text = [i for i in range(vocab) if true_tokenizer.token_bytes(i) not in (b"", b"\xff") and i not in special]
    assert vocabulary.alphabet.text == vocabulary.alphabet.only(text)
    luck = random.Random(4)
    seen = set()
    for round in range(24):
        schema = list(BOUNDED.values())[round % len(BOUNDED)]
        choice, form = ("required", None) if round % 2 else ("auto", Format(schema, True, ""))
        demand = constraint_for(true_tokenizer, TOOLS if round % 3 else TOOLS[1:2], choice, form, 6)
        assert demand is not None
        ids = drawn(demand, vocabulary, luck)
        theirs = oracle.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT, strict=True)
        parser = StreamParser(true_tokenizer)
        for token in ids:
            parser.feed(token)
        assert parser.repairs == 0 and len(parser.messages) == len(theirs)
        last, said = theirs[-1], theirs[-1].content[0].text
        seen.add(last.recipient or last.channel)
        if last.channel == "final":
            jsonschema.validate(json.loads(said), schema)
        else:
            assert last.content_type == "<|constrain|>json"
            wanted = {"functions.get": thing({}), "functions.get_weather": CITY}.get(last.recipient, {})
            jsonschema.validate(json.loads(said), wanted)
    assert "final" in seen and {"functions.get", "functions.get_weather"} <= seen
