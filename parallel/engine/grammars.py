"""Grammars, compiled by llguidance (https://github.com/guidance-ai/llguidance); matchers that work beside the steps.

What takes time runs in threads: compiling, and each next mask. A request waits for its own; nobody else does, but for
the vocabulary, which is made once. llguidance bounds both by counted work, so neither can hang. Knows the tokenizer of
the checkpoint as a file, and no text.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import UserError
from .constraint import Section
from .matcher import Alphabet, DeadEndError, Grammar, Structure
from .request import Request
from .schedule import Matcher

REMEMBERED = 64  # compiled grammars: clients ask for the same schema again and again
MASK_THREADS = 4  # a mask takes 0.1 ms of one core, seldom 1 ms


class Vocabulary:
    """The tokens as llguidance knows them. Takes 1 to 3 s to make for the published tokenizer.

    Raises UserError if the folder has no tokenizer.json that it can read.
    """

    def __init__(self, folder: Path, vocab: int) -> None:
        import llguidance  # here: who sends no constraint, a test of the scheduler for instance, needs none of it

        path = folder / "tokenizer.json"
        try:
            self.tokenizer: Any = llguidance.LLTokenizer(str(path), n_vocab=vocab)
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise UserError(f"{path} cannot be read for grammars: {said}", "copy or download the file again") from None
        self._matcher = llguidance.LLMatcher
        self._limits = llguidance.LLParserLimits(verbose_errors=False)  # no schema of a user in a message or a log
        text = [token for token in range(vocab) if not self.tokenizer.is_special_token(token)]
        self.alphabet = Alphabet(Alphabet(bytes(4 * -(-vocab // 32))).only(text))

    def compile(self, grammar: str) -> Any:
        """An LLMatcher at the beginning of a text. Raises DeadEndError."""
        return checked(self._matcher(self.tokenizer, grammar, log_level=0, limits=self._limits))


class Text:
    """A text under a compiled grammar; `Grammar` of matcher.py."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        checked(self._matcher)
        return mask

    @property
    def satisfied(self) -> bool:
        return self._matcher.is_accepting()

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        checked(self._matcher)


def checked(matcher: Any) -> Any:
    """The LLMatcher itself. Raises DeadEndError if it is in its error state, which it never leaves."""
    if matcher.is_error():
        raise DeadEndError(f"the grammar has no way on: {matcher.get_error().strip().partition(chr(10))[0]}")
    return matcher


class Grammars:
    """The leader's. vocabulary: called once, at the first need, in a thread.

    compiling, masking: where the two kinds of work run; of `compiling` there is one thread.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        compiling: Executor | None = None,
        masking: Executor | None = None,
    ) -> None:
        threads = max(1, min(MASK_THREADS, os.cpu_count() or 1))
        self._compiling = compiling or ThreadPoolExecutor(1, "compile")
        self._masking = masking or ThreadPoolExecutor(threads, "mask")
        self._vocabulary = vocabulary
        self._loaded: Vocabulary | None = None
        self._asked = False
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._news = threading.Event()

    def matcher_of(self, request: Request) -> Matcher | None:
        """Of a request with a constraint: at work already, `ready` a little later."""
        if request.constraint is None:
            return None
        return Beside(lambda: self._structure(request), self._submit_compile, self._submit_mask)

    def load(self) -> None:
        """Make the vocabulary now, in the thread; from the second call on nothing. For when nobody waits: llguidance
        holds Python's lock meanwhile, and this process does nothing else."""
        if not self._asked:
            self._asked = True
            self._compiling.submit(self._need)

    def wait(self, limit_s: float) -> None:
        """Until any matcher has become ready since the last call."""
        self._news.wait(limit_s)
        self._news.clear()

    def _structure(self, request: Request) -> Structure:
        """In the one thread that compiles."""
        assert request.constraint is not None
        vocabulary = self._need()
        first = {one.grammar: self._compile(vocabulary, one.grammar) for one in request.constraint.sections}

        def grammar_of(section: Section) -> Grammar | None:
            return Text(first[section.grammar].deep_copy()) if section.grammar else None

        return Structure(request.constraint, vocabulary.alphabet, grammar_of)

    def _need(self) -> Vocabulary:
        if self._loaded is None:
            self._loaded = self._vocabulary()
        return self._loaded

    def _compile(self, vocabulary: Vocabulary, grammar: str) -> Any:
        """At its beginning; never moved on, only copied."""
        if not grammar:
            return None
        if grammar not in self._compiled:
            self._compiled[grammar] = vocabulary.compile(grammar)
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > REMEMBERED:
            self._compiled.popitem(last=False)
        return self._compiled[grammar]

    def _submit_compile(self, work: Callable[[], Any]) -> "Future[Any]":
        return self._told(self._compiling.submit(work))

    def _submit_mask(self, work: Callable[[], Any]) -> "Future[Any]":
        return self._told(self._masking.submit(work))

    def _told(self, future: "Future[Any]") -> "Future[Any]":
        future.add_done_callback(lambda _: self._news.set())
        return future


Submit = Callable[[Callable[[], Any]], "Future[Any]"]


class Beside:
    """A Structure whose next mask is made while steps go on. Use it from one thread."""

    def __init__(self, make: Callable[[], Structure], submit_first: Submit, submit: Submit) -> None:
        self._submit = submit
        self._work = submit_first(lambda: _first(make))

    @property
    def ready(self) -> bool:
        return self._work.done() and self._work.exception() is None

    @property
    def failure(self) -> str | None:
        """Why no token can come next, once it is known; the matcher is of no use then."""
        error = self._work.exception() if self._work.done() else None
        if error is None:
            return None
        return str(error) if isinstance(error, DeadEndError | UserError) else f"{type(error).__name__}: {error}"

    def allowed(self) -> bytes:
        """Once it is ready."""
        return self._work.result()[1]

    def accept(self, token: int) -> None:
        """Once it is ready; it is no longer, then."""
        structure = self._work.result()[0]
        self._work = self._submit(lambda: _next(structure, token))

    def drop(self) -> None:
        """Grammars are compiled one after the other: those that wait should not wait for what nobody wants."""
        self._work.cancel()


def _first(make: Callable[[], Structure]) -> tuple[Structure, bytes]:
    structure = make()
    return structure, structure.allowed()


def _next(structure: Structure, token: int) -> tuple[Structure, bytes]:
    structure.accept(token)
    return structure, structure.allowed()


def grammars_of(checkpoint: str | None, vocab: int) -> Grammars:
    """For the model of a plan."""
    assert checkpoint is not None
    return Grammars(lambda: Vocabulary(Path(checkpoint), vocab))
