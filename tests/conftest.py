"""What all tests share: the switch that says whether a missing oracle is a skip or a failure.

An oracle is somebody else's program or data that a test compares ours with: the true tokenizer, openai-harmony,
Slurm. Away from the network some cannot be had; CI passes `--oracles-required` (through PYTEST_ADDOPTS), so that
none goes missing there unnoticed.
"""

import os
from collections.abc import Callable
from typing import NoReturn

import pytest

# Before torch is loaded, here and in the processes that tests start: OpenMP threads that spin while they wait take the
# cores from the very process that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--oracles-required",
        action="store_true",
        help="fail, rather than skip, a test whose oracle cannot be had",
    )


@pytest.fixture(scope="session")
def skip_or_fail(pytestconfig: pytest.Config) -> Callable[[str], NoReturn]:
    """Call with the reason why an oracle is missing."""

    def missing(reason: str) -> NoReturn:
        if pytestconfig.getoption("--oracles-required"):
            pytest.fail(f"an oracle is missing, and --oracles-required is on: {reason}", pytrace=False)
        pytest.skip(reason)

    return missing
