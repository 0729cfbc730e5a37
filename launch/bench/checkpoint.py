"""A checkpoint as something to measure: the ranks of a plan, asked through the engine's public call.

`EngineClient.generate(Request) -> stream of Token` is what the HTTP front end uses; every token arrives in this process
before it counts. Knows no HTTP and no text.
"""

import itertools
import random
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ...parallel.engine.request import Request, Sampling
from ...parallel.errors import UserError
from ...parallel.planning.plan import Plan
from .rows import About
from .target import Prompt, Room, Sample, id_range, random_ids

if TYPE_CHECKING:
    from ..engine_client import EngineClient

DIED_S = 2.0  # the engine's connection is seen to end a moment before the reason is known
PACKAGES = ("torch", "triton")


@dataclass(frozen=True)
class Checkpoint:
    """A started engine."""

    plan: Plan
    client: "EngineClient"
    about: About
    notes: tuple[str, ...] = ()
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def room(self) -> Room:
        return Room(min(self.plan.context_tokens, self.plan.kv_tokens), self.plan.sequences)

    def prompt(self, tokens: int, draw: random.Random) -> Prompt:
        return Prompt(tokens, random_ids(tokens, id_range(self.plan.spec.vocab), draw))

    async def stream(self, prompt: Prompt, new: int) -> Sample:
        """Exactly `new` tokens: no token stops it."""
        number = next(self._numbers)
        request = Request(f"bench-{number}", prompt.ids, new, Sampling(temperature=1.0, seed=number))
        came_s: list[float] = []
        sent_s = time.perf_counter()
        async with aclosing(self.client.generate(request)) as tokens:
            async for _ in tokens:
                came_s.append(time.perf_counter())
        return Sample(sent_s, came_s[-1], tuple(came_s), len(came_s), len(prompt.ids))


@asynccontextmanager
async def started(plan: Plan, worker: str, worker_arguments: Sequence[str] = ()) -> AsyncIterator[Checkpoint]:
    """The engine of `plan`, ready; it ends with the block. worker: the module that every rank runs.

    Raises UserError for what keeps it from starting, RankDiedError when a rank dies.
    """
    import asyncio

    from ..engine_client import EngineClient, EngineDiedError, local
    from ..loading import progress_bar
    from ..supervise import Supervisor

    began_s = time.monotonic()
    with progress_bar() as bar:
        async with Supervisor(plan, worker, bar.show, worker_arguments) as supervisor:
            await supervisor.start_replicas()
            answers = await supervisor.ready()
            bar.stop()
            client = EngineClient(local(supervisor.engine_socket(0)))
            await client.connect()
            notes = tuple(dict.fromkeys(path for answer in answers for path in (*answer.slow_paths, *answer.notes)))
            about = about_plan(plan, time.monotonic() - began_s)
            try:
                yield Checkpoint(plan, client, about, notes)
            except EngineDiedError as lost:
                try:
                    raise await asyncio.wait_for(supervisor.first_failure(), DIED_S) from None
                except TimeoutError:
                    raise UserError(str(lost), "the ranks still ran: this process may have been too slow") from None
            finally:
                client.close()


def about_plan(plan: Plan, start_s: float | None) -> About:
    return About(
        engine="gptoss-launch",
        version=_version("gptoss-launch"),
        model=Path(plan.model).name if Path(plan.model).is_dir() else plan.model,
        route="the engine's own socket, token ids, no stop token",
        device=device_name(plan),
        ranks=plan.ranks,
        ep=plan.ep,
        commit=commit(),
        packages={name: number for name in PACKAGES if (number := _version(name)) is not None},
        start_s=start_s,
    )


def device_name(plan: Plan) -> str:
    from ...parallel.planning.machine import probe

    return probe().gpus[0].name if plan.device == "cuda" else "cpu"


def commit() -> str | None:
    """Of the source that runs, with a + behind it if that has changed since; None where it is no clone."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None  # installed below somebody else's clone
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
