"""The three measurements on a target whose every time is known: what they say must be just that."""

import asyncio
import random
import time
from dataclasses import dataclass, field

import pytest
from gptoss_launch.launch.bench.measure import decode, prefill, runs_of, serve
from gptoss_launch.launch.bench.numbers import poisson_arrivals_s
from gptoss_launch.launch.bench.rows import About, Row, make_row, ratios, with_roofline
from gptoss_launch.launch.bench.target import Progress, Prompt, Room, Sample, id_range
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.roofline import Floor

CONTRACT = """engine version device model ranks ep batch prompt new prefill_tok_s decode_ms decode_tok_s ttft_ms
roofline date""".split()
FIRST_S, STEP_S = 0.25, 0.01


@dataclass
class Known:
    """Every stream's first token comes after first_s, and each further one step_s later; times are made up."""

    first_s: float = FIRST_S
    step_s: float = STEP_S
    ends_at: int = 10**9
    together: int = 1
    fails: frozenset[int] = frozenset()
    about: About = About("known", "1", "some-model", "made up", device="NVIDIA H200", ranks=1)
    room: Room = Room()
    notes: tuple[str, ...] = ()
    sent: list[tuple[float, int]] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)

    def prompt(self, tokens: int, draw: random.Random) -> Prompt:
        return Prompt(tokens, tuple(draw.randrange(1000) for _ in range(tokens)))

    async def stream(self, prompt: Prompt, new: int) -> Sample:
        await asyncio.sleep(0)
        now_s, number = time.perf_counter(), len(self.sent)
        self.sent.append((now_s, new))
        self.prompts.append(prompt.ids)
        if number in self.fails:
            return Sample(now_s, now_s, error="429: the queue is full")
        tokens = min(new, self.ends_at)
        came_s = tuple(self.first_s + i * self.step_s for i in range(0, tokens, self.together))
        return Sample(0.0, self.first_s + (tokens - 1) * self.step_s, came_s, tokens, prompt.tokens)


@pytest.fixture
def draw() -> random.Random:
    return random.Random(0)


def test_decode_says_what_is_known(draw: random.Random) -> None:
    target, told = Known(), []
    row = asyncio.run(decode(target, 8, 100, 50, 3, draw, Progress(lambda: told.append(1))))
    assert len(told) == runs_of("decode", 3, 0) == 7
    assert row.decode_ms == pytest.approx(10) and row.decode_tok_s == pytest.approx(800)
    assert row.tok_s_user == pytest.approx(100) and row.prefill_tok_s == pytest.approx(8 * 100 / FIRST_S)
    assert (row.ttft_ms, row.ttft_p99_ms) == pytest.approx((250, 250))
    assert (row.itl_ms, row.itl_p99_ms) == pytest.approx((10, 10))
    assert [new for _, new in target.sent] == [51] * 8 + ([1] * 8 + [51] * 8) * 3  # warm, then as the peers are timed
    assert len(set(target.prompts)) == len(target.prompts)  # no prefix is in any cache
    assert not row.notes and set(CONTRACT) <= set(row.to_json())


def test_prefill_says_what_is_known(draw: random.Random) -> None:
    row = asyncio.run(prefill(Known(), 4, 100, 2, draw, Progress()))
    assert row.prefill_tok_s == pytest.approx(400 / FIRST_S) and row.ttft_ms == pytest.approx(250)
    assert row.decode_ms is None and row.itl_ms is None and row.new == 1


def test_answers_that_end_early_are_said_and_counted_as_they_are(draw: random.Random) -> None:
    row = asyncio.run(decode(Known(ends_at=11), 2, 10, 50, 2, draw, Progress()))
    assert row.decode_ms == pytest.approx(10) and row.decode_tok_s == pytest.approx(200)
    assert any("4 of 4 streams ended before 51 tokens" in note for note in row.notes)


def test_tokens_that_come_together_are_said(draw: random.Random) -> None:
    row = asyncio.run(decode(Known(together=2), 1, 10, 7, 1, draw, Progress()))
    assert "8 tokens came in 4 pieces: ITL is between pieces" in row.notes
    assert row.itl_ms == pytest.approx(20) and row.decode_ms == pytest.approx(10)


def test_a_time_below_the_noise_is_none(draw: random.Random) -> None:
    row = asyncio.run(decode(Known(step_s=0.0), 1, 10, 7, 1, draw, Progress()))
    assert row.decode_ms is None and row.decode_tok_s is None
    assert any("nothing can be said" in note for note in row.notes)


def test_a_stream_that_fails_ends_a_decode(draw: random.Random) -> None:
    with pytest.raises(UserError, match="known: 1 of 2 streams failed; 1: 429: the queue is full"):
        asyncio.run(decode(Known(fails=frozenset({5})), 2, 10, 7, 2, draw, Progress()))


def test_serve_at_a_rate_sends_when_requests_arrive() -> None:
    target = Known(fails=frozenset({3, 6}))  # 0 is to warm it
    began_s = time.perf_counter()
    row = asyncio.run(serve(target, 10, 7, 12, 5, Progress(), rate=60.0))
    sent_s = sorted(at_s - began_s for at_s, new in target.sent if new == 7)
    arrivals_s = poisson_arrivals_s(60.0, 12, seed=5)
    assert all(sent >= arrival for sent, arrival in zip(sent_s, arrivals_s, strict=True))
    assert (row.rate, row.batch, row.requests, row.seed) == (60.0, None, 12, 5)
    assert row.failed == {"429: the queue is full": 2}
    assert row.decode_ms == pytest.approx(10) and row.tok_s_user == pytest.approx(100)
    assert row.request_ms == pytest.approx((FIRST_S + 6 * STEP_S) * 1e3)


def test_serve_in_lanes_keeps_so_many_in_flight() -> None:
    @dataclass
    class Counting(Known):
        now: int = 0
        most: int = 0

        async def stream(self, prompt: Prompt, new: int) -> Sample:
            self.now += 1
            self.most = max(self.most, self.now)
            for _ in range(random.Random(len(self.sent)).randrange(1, 4)):
                await asyncio.sleep(0)
            self.now -= 1
            return await super().stream(prompt, new)

    target = Counting()
    row = asyncio.run(serve(target, 10, 7, 20, 0, Progress(), batch=3))
    assert target.most == 3 and len(target.sent) == 3 + 20 and row.batch == 3 and not row.failed


def test_a_load_without_one_answer_has_no_speed() -> None:
    row = asyncio.run(serve(Known(fails=frozenset(range(1, 9))), 10, 7, 8, 0, Progress(), rate=1000.0))
    assert row.failed == {"429: the queue is full": 8}
    assert row.decode_tok_s is None and row.prefill_tok_s is None and row.ttft_ms is None and row.decode_ms is None


def test_prompts_of_a_published_model_are_those_of_the_peers() -> None:
    assert id_range(201_088) == (1000, 190_000)
    low, high = id_range(1008)
    assert low == 0 and high < 1000


# --- rows


def row(engine: str, batch: int, **figures: float) -> Row:
    return make_row("decode", about(engine), prompt=10, new=5, batch=batch, **figures)


def about(engine: str) -> About:
    return About(engine, "1", "m", "r", device="NVIDIA H200")


def test_ratios_say_how_many_times_better() -> None:
    rows = [
        row("ours", 1, decode_tok_s=600.0, ttft_ms=20.0, itl_ms=2.0),
        row("peer", 1, decode_tok_s=300.0, ttft_ms=10.0),
        row("ours", 8, decode_tok_s=900.0),
        row("peer", 32, decode_tok_s=300.0),
    ]
    (only,) = ratios(rows, about("ours"), about("peer"))
    assert only["batch"] == 1 and only["decode"] == 2.0 and only["ttft"] == 0.5
    assert "itl" not in only and only["engine"] == "ours" and only["against"] == "peer 1"


def test_a_row_beside_its_floor() -> None:
    floor = Floor(weight_bytes=4.0e9, kv_bytes=4 * 10**8, bytes_per_s=4.4e12)
    with_floor = with_roofline(row("ours", 1, decode_ms=4.0), floor)
    assert with_floor.floor_ms == pytest.approx(1.0) and with_floor.roofline == pytest.approx(0.25)
    assert with_floor.read_bytes == 4_400_000_000 and not with_floor.notes
    unknown = with_roofline(row("ours", 1, decode_ms=4.0), Floor(4.0e9, 0, None))
    assert unknown.roofline is None and unknown.notes == ("no roofline: the bandwidth of NVIDIA H200 is unknown",)
    assert with_roofline(row("ours", 1), "nobody knows").notes == ("no roofline: nobody knows",)


def test_figures_have_six_digits() -> None:
    assert row("ours", 1, decode_ms=1.23456789).to_json()["decode_ms"] == 1.23457
