"""Which graph a step takes, and that its record is as long as the graph's; graphs themselves are for a GPU."""

from gptoss_launch.parallel.engine.graphs import Graphs
from gptoss_launch.parallel.engine.record import Padding, Sizes, encode, places
from gptoss_launch.parallel.engine.request import Request
from gptoss_launch.parallel.engine.schedule import Item, Running, Step
from gptoss_launch.parallel.engine.start import chunk_sizes, decode_sizes
from gptoss_launch.parallel.kernels.batch import TILE_TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, STEP_TOKENS = 256, 2048
SIZES = Sizes(rows=ROWS, row_pages=64, scratch_page=9999, step_tokens=STEP_TOKENS, page_tokens=64, vocab=64)
GRAPHS = Graphs(decode_sizes(ROWS), chunk_sizes(STEP_TOKENS), ROWS, run=lambda head, draw: (None, None))


def step_of(decodes: int, chunks: list[int]) -> Step:
    items = []
    for row, count in enumerate([1] * decodes + chunks):
        running = Running(Request(f"{row}", (7,) * count, 1), 0.0, row=row)
        items.append(Item(running, 0, 0, count, draws=True))
    return Step(tuple(items), decodes, False, (), ())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, ROWS - 1), st.lists(st.integers(2, 600), min_size=1, max_size=ROWS), st.booleans())
def test_every_step_with_chunks_fits_into_a_graph(decodes: int, chunks: list[int], short: bool) -> None:
    """Chunks of any number and length that a step holds: padded by less than a quarter unless they are short."""
    chunks = [min(count, 3) if short else count for count in chunks[: ROWS - decodes]]
    while decodes + sum(chunks) > STEP_TOKENS:
        chunks.pop()
    step = step_of(decodes, chunks)
    padding = GRAPHS.of(step)
    assert padding.tokens >= step.tokens and padding.tiles
    record = encode(step, 1, SIZES, padding)
    assert record.head.decodes == decodes and record.head.draws == len(step.items)
    assert record.chunks[-1].stop == record.head.tokens == padding.tokens
    tiles = record.words[places(record.head)["tile"]].tolist()
    covered = [token for at in range(0, len(tiles), 4) for token in range(tiles[at], tiles[at + 1])]
    assert covered == list(range(decodes, padding.tokens))
    if sum(chunks) >= TILE_TOKENS * len(chunks):
        assert padding.tokens <= max(16, step.tokens * 5 / 4)


def test_sizes() -> None:
    assert chunk_sizes(48) == (16, 20, 24, 28, 32, 40, 48)
    assert chunk_sizes(10) == (10,)
    assert chunk_sizes(2048, offloaded=True) == ()
    assert GRAPHS.of(step_of(5, [])) == Padding(8)
    assert Graphs((), (), 4, run=lambda head, draw: (None, None)).of(step_of(0, [9])) == Padding()
