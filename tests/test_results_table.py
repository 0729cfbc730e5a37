"""The README's table of speed: made from files of results, and only from those that have every key."""

import json
from pathlib import Path

import pytest
import readme
from gptoss_launch.launch.bench.rows import About, make_row
from results_table import KEYS, NONE_YET, RESULTS, markdown, read_results


def line(
    engine: str, batch: int, tok_s: float | None, *, ranks: int = 1, date: str = "2026-12-01T10:00:00+00:00"
) -> str:
    about = About(engine, "1.0", "20b", "r", device="NVIDIA H200", ranks=ranks, ep=1, commit="abc1234")
    row = make_row("decode", about, prompt=1024, new=128, batch=batch, decode_tok_s=tok_s, decode_ms=1.5, roofline=0.61)
    return json.dumps(row.to_json() | {"date": date})


def test_nothing_yet(tmp_path: Path) -> None:
    assert markdown(read_results(tmp_path)) == NONE_YET
    assert markdown(read_results(tmp_path / "missing")) == NONE_YET


def test_a_table_of_two_engines(tmp_path: Path) -> None:
    rows = [
        line("vllm", 1, 333.0),
        line("gptoss-launch", 1, 500.0),
        line("gptoss-launch", 1, 732.6, date="2026-12-02T10:00:00+00:00"),  # newer
        line("gptoss-launch", 8, 2000.0),
        line("gptoss-launch", 1, 900.0, ranks=2),
        json.dumps({"rows": [], "ratios": []}),
    ]
    (tmp_path / "20b_h200_2026-12-01.jsonl").write_text("\n".join(rows) + "\n")
    assert markdown(read_results(tmp_path)).splitlines() == [
        "decode of 20b on NVIDIA H200: prompts of 1,024 tokens, 128 new, 2026-12-01 to 2026-12-02, "
        "[20b_h200_2026-12-01.jsonl](tests/benchmarks/results/20b_h200_2026-12-01.jsonl)",
        "",
        "| engine | GPUs | batch or rate | step ms | tok/s | % roofline | x vllm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| gptoss-launch 1.0 `abc1234` | 1 | 1 | 1.50 | 733 | 61 | 2.20 |",
        "| vllm 1.0 `abc1234` | 1 | 1 | 1.50 | 333 | 61 |  |",
        "| gptoss-launch 1.0 `abc1234` | 1 | 8 | 1.50 | 2,000 | 61 |  |",
        "| gptoss-launch 1.0 `abc1234` | 2 | 1 | 1.50 | 900 | 61 |  |",
    ]


def test_engines_of_different_files_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line("vllm", 1, 333.0) + "\n")
    (tmp_path / "b.jsonl").write_text(line("gptoss-launch", 1, 700.0) + "\n")
    shown = markdown(read_results(tmp_path))
    assert shown.count("decode of 20b") == 2 and "x vllm" not in shown


@pytest.mark.parametrize(
    ("text", "message"), [("{", "a.jsonl:1: no JSON"), ('{"engine": "x", "bench": "decode"}', "a.jsonl:1: no version")]
)
def test_a_broken_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path)


def test_rows_of_ours_have_the_keys() -> None:
    assert set(KEYS) <= set(json.loads(line("x", 1, None)))


def test_the_readme_has_what_is_kept() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert f"<!-- results -->\n{markdown(read_results(RESULTS))}<!-- /results -->" in text
