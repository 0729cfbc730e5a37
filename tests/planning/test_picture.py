"""The picture and the table of a plan: every rank is in them, with shares that add up."""

import re

import pytest
from gptoss_launch.parallel.planning.choice import Asked
from gptoss_launch.parallel.planning.machine import read_machine
from gptoss_launch.parallel.planning.picture import picture, rank_table
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.planner import plan as choose_plan
from gptoss_launch.parallel.planning.spec import PUBLISHED

MODEL = "openai/gpt-oss-120b"


def planned(ranks: int, ep: int) -> Plan:
    return choose_plan(PUBLISHED[MODEL], read_machine("h100x8"), Asked(ranks=ranks, ep=ep), model=MODEL)


@pytest.mark.parametrize(("ranks", "ep"), [(8, 1), (8, 8), (6, 2), (3, 3), (1, 1)])
def test_table_covers_everything_that_is_cut(ranks: int, ep: int) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in rank_table(planned(ranks, ep)).splitlines()
    ]
    assert len(rows) == ranks + 2 and [row[0] for row in rows[2:]] == [str(rank) for rank in range(ranks)]
    for column, whole, copies in ((1, 64, 1), (2, 8, 1), (3, 128, ranks // ep), (4, 2880, ep), (5, 201088, 1)):
        held = 0
        for row in rows[2:]:
            found = re.fullmatch(rf"(\d+)(?:-(\d+))? of {whole}", row[column])
            assert found
            held += int(found[2] or found[1]) - int(found[1]) + 1
        assert held == whole * copies


def test_table_of_120b_on_8_gpus() -> None:
    assert rank_table(planned(8, 8)).splitlines()[-1] == (
        "| 7 | 56-63 of 64 | 7 of 8 | 112-127 of 128 | 0-2879 of 2880 | 175952-201087 of 201088 | 7.6 GiB |"
    )


def test_picture_names_every_rank_twice_and_both_sums() -> None:
    text = picture(planned(8, 8))
    assert text.startswith("```mermaid\nflowchart TB\n") and text.endswith("```\n")
    for rank in range(8):
        assert text.count(f'"rank {rank}<br/>') == 2
    assert '"rank 3<br/>experts 48-63<br/>width 0-2879"' in text and text.count("all-reduce") == 2
    assert "36 layers" in text
