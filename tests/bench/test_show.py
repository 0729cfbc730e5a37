"""Rows for people: the table, the ratios, the notes, and the picture."""

import io
from pathlib import Path

from gptoss_launch.launch.bench.rows import About, Row, make_row
from gptoss_launch.launch.bench.show import draw, report
from rich.console import Console

PNG = b"\x89PNG\r\n\x1a\n"


def row(engine: str = "ours", batch: int | None = 8, **figures: object) -> Row:
    about = About(engine, "1.2", "some-model", "r", device="NVIDIA H200", ranks=1)
    return make_row("decode", about, prompt=1024, new=128, batch=batch, **figures)


def text(rows: list[Row], ratios: list[dict] | None = None) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False, markup=False)
    console.print(report(rows, ratios or []))
    return console.file.getvalue()


def test_a_table_has_what_was_measured_and_no_empty_column() -> None:
    shown = text([row(decode_ms=2.5, decode_tok_s=3200.0, tok_s_user=400.0, ttft_ms=30.0, ttft_p99_ms=45.5)])
    shown += text([row(roofline=0.601, itl_ms=2.25, itl_p99_ms=3.5)])
    for part in ("ours 1.2", "1,024", "2.500", "3,200.0", "400.0", "30.00 / 45.50", "60.1", "2.25 / 3.50"):
        assert part in shown
    assert "rate /s" not in shown and "failed" not in shown


def test_ratios_kernels_notes_and_failures_follow() -> None:
    ratio = {"batch": 8, "rate": None, "engine": "ours", "against": "vllm 0.26.0", "decode": 2.2, "ttft": 0.5}
    rows = [row(kernels={"experts": 300.0, "attention": 100.0}, notes=("careful",), failed={"429: full": 3})]
    shown = text(rows, [ratio])
    assert "batch 8: ours against vllm 0.26.0: decode 2.20 x, ttft 0.50 x" in shown
    assert "batch 8: 400.0 us of kernels a step: experts 300.0 us (75%), attention 100.0 us (25%)" in shown
    assert "note: ours: careful" in shown and "failed: ours: 3 x 429: full" in shown


def test_the_picture_is_one(tmp_path: Path) -> None:
    rows = [row(name, batch, decode_ms=1.0 + batch, decode_tok_s=90.0 * batch) for name in "ab" for batch in (1, 8)]
    rows += [row("a", 32)]  # nothing to draw
    rows += [row("a", None, rate=2.0, decode_ms=3.0, decode_tok_s=10.0)]
    draw(rows, tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    assert data.startswith(PNG) and len(data) > 5000
