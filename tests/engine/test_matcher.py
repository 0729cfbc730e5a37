"""The state machine over token ids, against a regular expression of what it should let through; grammars of llguidance;
and matchers that work beside the steps.
"""

import dataclasses
import json
import random
import re
import threading
from pathlib import Path

import jsonschema
import pytest
from bounded_schemas import BOUNDED
from gptoss_launch.launch.json_grammar import flaw_of, json_grammar
from gptoss_launch.launch.tokenizer import load_tokenizer
from gptoss_launch.parallel.engine.constraint import MOST_GRAMMAR_BYTES, Constraint, Section, flaw
from gptoss_launch.parallel.engine.grammars import Grammars, Text, Vocabulary
from gptoss_launch.parallel.engine.matcher import Alphabet, DeadEndError, Structure
from gptoss_launch.parallel.engine.request import Request
from gptoss_launch.parallel.errors import UserError
from small_models import TINY

# Letters stand for tokens: small ones are text, capitals markup.
LETTERS = "abcdefghij" + "SCMERT"
TEXT, VOCAB = "abcdefghij", len(LETTERS)


def ids(word: str) -> tuple[int, ...]:
    return tuple(map(LETTERS.index, word))


def bits(word: str) -> bytes:
    return Alphabet(bytes(4)).only(ids(word))


ALPHABET = Alphabet(bits(TEXT))
THINK = Section((ids("CaM"),), ids("E"), reasoning=True)
SAY = Section((ids("CbM"),), ids("E"))
CALL = Section((ids("CbaM"), ids("aCbM")), ids("T"), grammar="three d")
ANSWER = Section((ids("CcM"),), ids("R"))


class ThreeD:
    """The text "ddd", and no other."""

    def __init__(self) -> None:
        self.left = 3

    def mask(self) -> bytes:
        return bits("dSR" if self.left else "S")  # markup is not for a grammar to allow

    @property
    def satisfied(self) -> bool:
        return self.left == 0

    def accept(self, token: int) -> None:
        assert token == LETTERS.index("d")
        self.left -= 1


def walk(constraint: Constraint, luck: random.Random, most: int = 400) -> str:
    """Letters drawn at random among those allowed, until one that ends the answer."""
    structure = Structure(constraint, ALPHABET, lambda section: ThreeD() if section.grammar else None)
    said = ""
    while len(said) < most and said[-1:] not in ("R", "T"):
        mask = int.from_bytes(structure.allowed(), "little")
        letter = luck.choice([letter for place, letter in enumerate(LETTERS) if mask >> place & 1])
        said += letter
        if letter not in "RT":
            structure.accept(LETTERS.index(letter))
    return said


ANYTHING = r"(?:(?:CaM[a-j]*ESj(?!CaM))?(?:CbM[a-j]*ESj)?)*"


@pytest.mark.parametrize(
    ("sections", "pattern"),
    [
        ((THINK, ANSWER), r"(CaM[a-j]*ESj)?CcM[a-j]*R"),
        ((THINK, CALL), r"(CaM[a-j]*ESj)?(CbaM|aCbM)dddT"),
        ((THINK, SAY, CALL, ANSWER), ANYTHING + r"((CbaM|aCbM)dddT|CcM[a-j]*R)"),
    ],
)
@pytest.mark.parametrize("budget", [None, 0, 1, 5])
def test_what_may_come(sections, pattern, budget) -> None:
    constraint = Constraint(sections, ids("Sj"), budget)
    luck = random.Random(1)
    everything = [walk(constraint, luck) for _ in range(150)]
    for said in everything:
        assert re.fullmatch(pattern, said), said
        thought = [len(text) + 1 for text in re.findall(r"CaM([a-j]*)E", said)]  # with the token that ends it
        assert budget is None or sum(thought) <= budget
        assert budget != 0 or not thought
    spent = [said for said in everything if budget and re.search(rf"CaM[a-j]{{{budget - 1}}}E", said)]
    assert bool(spent) == (budget in (1, 5)), "a budget is used up now and then"
    assert ("T" if CALL in sections else "R") in "".join(everything)
    assert budget == 0 or "CaM" in "".join(everything)


def test_flaws() -> None:
    good = Constraint((THINK, CALL, ANSWER), ids("Sj"), 5)
    stops = ids("RT")
    assert flaw(good, stops, VOCAB) is None
    twice = Section((ids("CcMa"),), ids("R"))
    for sections, why in (
        ((THINK, ANSWER, twice), "begin each other"),
        ((THINK, ANSWER, ANSWER), "begin each other"),
        ((dataclasses.replace(ANSWER, headers=((),)),), "begin each other"),
        ((dataclasses.replace(ANSWER, ends=()),), "cannot end"),
        ((THINK, SAY), "no answer ends"),
        ((), "no answer ends"),
        ((dataclasses.replace(ANSWER, ends=(VOCAB,)),), f"vocabulary of {VOCAB}"),
        ((dataclasses.replace(ANSWER, grammar="x" * MOST_GRAMMAR_BYTES), CALL), str(MOST_GRAMMAR_BYTES)),
    ):
        assert why in flaw(dataclasses.replace(good, sections=sections), stops, VOCAB)
    assert "less than 0" in flaw(dataclasses.replace(good, max_reasoning_tokens=-1), stops, VOCAB)


# --- llguidance


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TINY, 1050)  # more than the tokenizer has: the model's logits may be longer


def test_text_is_what_the_tokenizer_has_but_for_markup(vocabulary) -> None:
    tokenizer = load_tokenizer(TINY)
    special = set(tokenizer.special.values())
    # 0xff stands in no UTF-8, and llguidance keeps it for markup
    text = [i for i in range(1050) if tokenizer.token_bytes(i) not in (b"", b"\xff") and i not in special]
    assert vocabulary.alphabet.text == Alphabet(bytes(4 * 33)).only(text)


def write(vocabulary: Vocabulary, schema: dict, luck: random.Random) -> str:
    """A text under the schema, each token drawn at random among those allowed."""
    text, tokens = Text(vocabulary.compile(json_grammar(schema, True))), []
    end = 1007
    while len(tokens) < 1000:
        mask = int.from_bytes(vocabulary.alphabet.within(text.mask(), (end,) if text.satisfied else ()), "little")
        token = luck.choice([token for token in range(1050) if mask >> token & 1])
        if token == end:
            return vocabulary.tokenizer.decode_str(tokens)
        assert token < 1003, "markup or no token at all"
        text.accept(token)
        tokens.append(token)
    raise AssertionError(f"no end after {tokens}")


@pytest.mark.parametrize("name", BOUNDED)
def test_texts_are_what_their_schema_says(vocabulary, name) -> None:
    schema = BOUNDED[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    for seed in range(3):
        jsonschema.validate(json.loads(write(vocabulary, schema, random.Random(seed))), schema)


def test_the_oracle_finds_what_is_wrong() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "far too long", "note": "ab"}, BOUNDED["strings"])


def test_flaws_of_schemas() -> None:
    for schema, why in (
        ({"type": "strng"}, "strng"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum (5)"),
        ({"$ref": "#/$defs/x"}, "/$defs/x"),
        ({"$ref": "http://example.org/x"}, "does not fetch"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(9)]}, "too large"),
    ):
        for strict in (True, False):
            assert why in flaw_of(json_grammar(schema, strict))
    for schema in ({"not": {}}, {"type": "array", "uniqueItems": True}, {"oneOf": [{"type": "string"}, {}]}):
        assert flaw_of(json_grammar(schema, True)) and flaw_of(json_grammar(schema, False)) is None


# --- beside the steps


def request(grammar: str, number: int = 1) -> Request:
    answer = Section(((1010, 5, 1013),), (1007,), grammar)
    return Request(f"{number}", (1,), 100, stop_tokens=(1007,), constraint=Constraint((answer,), (1011,)))


def until_ready(grammars: Grammars, matcher) -> None:
    for _ in range(3000):
        if matcher.ready or matcher.failure:
            return
        grammars.wait(0.01)
    raise AssertionError("it is never ready")


def test_a_matcher_is_ready_a_little_later(vocabulary) -> None:
    gate = threading.Event()

    def load() -> Vocabulary:
        gate.wait()
        return vocabulary

    grammars = Grammars(load)
    assert grammars.matcher_of(Request("x", (1,), 1)) is None
    matcher = grammars.matcher_of(request(json_grammar(BOUNDED["booleans"], True)))
    assert not matcher.ready and matcher.failure is None
    gate.set()
    for token in (1010, 5, 1013):
        until_ready(grammars, matcher)
        assert matcher.allowed() == vocabulary.alphabet.only([token])
        matcher.accept(token)
    until_ready(grammars, matcher)
    assert matcher.failure is None and matcher.allowed() != vocabulary.alphabet.text


def test_an_idle_leader_makes_the_vocabulary_once(vocabulary) -> None:
    """Not each time that it is idle, if it cannot be made; whoever needs it hears why."""
    made = []

    def load() -> Vocabulary:
        made.append(True)
        raise UserError("no tokenizer")

    grammars = Grammars(load)
    for _ in range(3):
        grammars.load()
    matcher = grammars.matcher_of(request(""))  # after them, in the same thread
    until_ready(grammars, matcher)
    assert "no tokenizer" in matcher.failure and len(made) == 2


def test_answers_under_one_schema_do_not_share_their_state(vocabulary) -> None:
    grammars = Grammars(lambda: vocabulary)
    grammar = json_grammar({"enum": ["left"]}, True)
    several = [grammars.matcher_of(request(grammar, number)) for number in range(3)]
    answer = (1010, 5, 1013, *vocabulary.tokenizer.tokenize_str('"left"'), 1007)
    for matcher in several:  # one after the other
        for token in answer:
            until_ready(grammars, matcher)
            assert int.from_bytes(matcher.allowed(), "little") >> token & 1
            if token != 1007:
                matcher.accept(token)


def test_a_failure_says_why_and_spares_the_others(vocabulary, tmp_path: Path) -> None:
    grammars = Grammars(lambda: vocabulary)
    bad = grammars.matcher_of(request('{"grammars": [{"json_schema": {"type": "strng"}}]}'))
    until_ready(grammars, bad)
    assert not bad.ready and "strng" in bad.failure
    lost = grammars.matcher_of(request(json_grammar(BOUNDED["const"], True)))
    until_ready(grammars, lost)
    lost.accept(7)  # a token that was not allowed
    until_ready(grammars, lost)
    assert not lost.ready and "token 7" in lost.failure
    good = grammars.matcher_of(request(""))
    until_ready(grammars, good)
    assert good.ready and good.failure is None
    with pytest.raises(UserError, match="tokenizer.json"):
        Vocabulary(tmp_path, 1024)


def test_no_way_on_is_a_dead_end(vocabulary) -> None:
    """A vocabulary that lacks what the grammar asks for next."""
    lacks = Alphabet(bytes(len(vocabulary.alphabet.text)))
    text = vocabulary.compile(json_grammar({"enum": ["left"]}, True))
    structure = Structure(Constraint((Section(((1,),), (2,), "g"),), ()), lacks, lambda section: Text(text))
    structure.accept(1)
    with pytest.raises(DeadEndError, match="no token of the vocabulary"):
        structure.allowed()
