"""Pages of the KV cache: who holds which, and which can be found again by what they contain.

Full layers keep every page of a sequence; window layers give a page back once no later token can see it. A page that is
complete gets a name made of all tokens up to its end, one name for each kind of layer; when nobody holds it any more it
is kept, and a later sequence with the same beginning takes it over, until its place is needed. Knows page numbers and
token ids only; the tensors are the engine's.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from ..planning.spec import LayerKind, Spec

DROPPED = (
    -1
)  # a window page that was given back; the entry stays, so that entry i is always positions i * page_tokens on

Name = tuple[LayerKind, bytes]


class Pool:
    """All pages of one rank's cache: held (by so many tables), kept (by nobody, but named), or free."""

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # the first is the longest unused
        self._holders = [0] * pages
        self._names: list[Name | None] = [None] * pages
        self._pages: dict[Name, int] = {}

    @property
    def pages(self) -> int:
        return len(self._holders)

    @property
    def available(self) -> int:
        """Pages that `take` can give out."""
        return len(self._free) + len(self._kept)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def take(self) -> int:
        """A page for new content, held once. The caller has made sure that one is available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def find(self, name: Name) -> int | None:
        return self._pages.get(name)

    def is_kept(self, page: int) -> bool:
        return page in self._kept

    def hold(self, page: int) -> None:
        """One more holder of a page that was found."""
        self._kept.pop(page, None)
        self._holders[page] += 1

    def give_back(self, page: int) -> None:
        """One holder less; with the last one gone the page is kept if it has a name."""
        assert self._holders[page] > 0, f"page {page} is held by nobody"
        self._holders[page] -= 1
        if not self._holders[page]:
            if self._names[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def name(self, page: int, name: Name) -> None:
        """`page` is complete and will not change while somebody holds it. The first page of a name keeps it."""
        if name not in self._pages:
            assert self._names[page] is None, f"page {page} has a name"
            self._names[page], self._pages[name] = name, page

    def forget(self) -> None:
        """No page can be found any more: what a step that failed was to write into them is not there."""
        self._free += self._kept
        self._kept.clear()
        self._pages.clear()
        self._names = [None] * len(self._names)

    def _forget(self, page: int) -> None:
        name = self._names[page]
        if name is not None:
            del self._pages[name]
            self._names[page] = None


@dataclass
class Table:
    """The pages of one sequence, for both kinds of layers, and what their content is called.

    changes: (kind, index, page) entries that the device does not know yet. names: digests of the whole pages of tokens
    known so far; `named` of them have been given to the pool.
    """

    length: int = 0
    pages: dict[LayerKind, list[int]] = field(default_factory=lambda: {"window": [], "full": []})
    changes: list[tuple[LayerKind, int, int]] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    named: int = 0


@dataclass(frozen=True)
class Cache:
    """The pool and the sizes that its arithmetic needs."""

    pool: Pool
    spec: Spec
    page_tokens: int

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return tuple(kind for kind in ("window", "full") if self.spec.layers_of(kind))

    def missing(self, table: Table, tokens: int) -> int:
        """Pages that `extend` would take from the pool."""
        last = -(-(table.length + tokens) // self.page_tokens)
        return sum(max(0, last - len(table.pages[kind])) for kind in self.kinds)

    def extend(self, table: Table, tokens: int) -> None:
        """Make room for `tokens` more; the pool has the pages that `missing` says."""
        table.length += tokens
        for kind in self.kinds:
            pages = table.pages[kind]
            while len(pages) * self.page_tokens < table.length:
                pages.append(self.pool.take())
                table.changes.append((kind, len(pages) - 1, pages[-1]))

    def drop_passed(self, table: Table, known: int) -> None:
        """Give back window pages that end before what the next token sees: itself and window - 1 before it.

        known: the first position that may have to be computed again, because a token was void.
        """
        pages = table.pages["window"]
        first_seen = min(table.length, known) - self.spec.window_tokens + 1
        for index in range(min(len(pages), max(0, first_seen) // self.page_tokens) - 1, -1, -1):
            if pages[index] == DROPPED:
                break
            self.pool.give_back(pages[index])
            pages[index] = DROPPED

    def release(self, table: Table) -> None:
        """Give everything back, the end of the sequence first: its beginning is what others may share."""
        for kind in self.kinds:
            for page in reversed(table.pages[kind]):
                if page != DROPPED:
                    self.pool.give_back(page)
            table.pages[kind].clear()
        table.length = table.named = 0
        table.changes.clear()

    # --- what pages contain

    def digest(self, table: Table, tokens: Many[int], count: int) -> None:
        """Digests of the first `count` whole pages of `tokens`: each covers all that is before it, too."""
        for index in range(len(table.names), count):
            before = table.names[-1] if table.names else b""
            page = tokens[index * self.page_tokens : (index + 1) * self.page_tokens]
            packed = struct.pack(f"<{len(page)}i", *page)
            table.names.append(hashlib.blake2b(packed, digest_size=16, key=before).digest())

    def name_complete(self, table: Table, tokens: Many[int]) -> None:
        """Name the pages that are complete: in the cache, and of tokens that are known."""
        complete = min(table.length, len(tokens)) // self.page_tokens
        self.digest(table, tokens, complete)
        for index in range(table.named, complete):
            for kind in self.kinds:
                page = table.pages[kind][index]
                if page != DROPPED:
                    self.pool.name(page, (kind, table.names[index]))
        table.named = max(table.named, complete)

    def longest_prefix(self, table: Table, tokens: Many[int], limit_tokens: int) -> int:
        """Whole pages at the beginning of `tokens`, at most limit_tokens of them, that the cache still has.

        Full layers need all of them; window layers those that the next token sees. Where window pages are gone the
        prefix is shortened to the longest that has its own.
        """
        most = min(limit_tokens, len(tokens)) // self.page_tokens
        self.digest(table, tokens, most)

        def has(kind: LayerKind, index: int) -> bool:
            return self.pool.find((kind, table.names[index])) is not None

        if "full" in self.kinds:
            most = next((index for index in range(most) if not has("full", index)), most)
        if "window" not in self.kinds:
            return most
        end, run = most, 0
        for index in range(most - 1, -1, -1):
            run += 1
            if not has("window", index):
                end, run = index, 0
            if run and run >= end - self._first_seen(end):
                return end
        return 0

    def _first_seen(self, pages: int) -> int:
        """Index of the first window page that the token after `pages` pages sees."""
        return max(0, pages * self.page_tokens - self.spec.window_tokens + 1) // self.page_tokens

    def prefix_pages(self, table: Table, pages: int) -> list[tuple[LayerKind, int, int]]:
        """(kind, index, page) of a prefix that `longest_prefix` found."""
        entries: list[tuple[LayerKind, int, int]] = []
        for kind in self.kinds:
            for index in range(self._first_seen(pages) if kind == "window" else 0, pages):
                page = self.pool.find((kind, table.names[index]))
                assert page is not None
                entries.append((kind, index, page))
        return entries

    def adopt(self, table: Table, pages: int) -> None:
        """Begin `table`, which is empty, with a prefix of so many pages."""
        entries = self.prefix_pages(table, pages)
        for kind, index, page in entries:
            self.pool.hold(page)
            table.pages[kind] += [DROPPED] * (index - len(table.pages[kind]))
            table.pages[kind].append(page)
        table.changes += entries
        table.length = pages * self.page_tokens
        table.named = pages
