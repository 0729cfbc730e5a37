"""Everything that runs for one command: a torchrun for each replica of this node, or for its part of one that lies on
several, and on the first node the HTTP process, in one private run folder. A plan of a single rank needs no torchrun,
which takes as long to load torch as the rank does, and before it: that rank is started as torchrun would start it.

Starts them, says when they are ready or which died first, restarts replicas that die while others serve (`restarts`),
and ends them. Nothing outlives the command: every process holds a lifeline (`lifeline`) on a control socket in the run
folder (`crew`). Does not know what a request is.

    plan.json  http.sock
    engine-0.sock               where the leader of replica 0 listens, whichever life it is in
    replica-0.1/                the first life of replica 0: control socket, traces, logs
    replica-0.1.sock            its control socket, for torchrun

What a single rank has in the folder of its life lies in the run folder itself: it has one life.

A process whose lifeline ends removes the folder that its control socket lies in. For a rank that is the folder of its
life, so that a replica which ends alone takes nothing from the others; torchrun, whose lifeline ends with the command
alone, and the HTTP process remove all of it.
"""

import asyncio
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

from ..parallel.engine.lifeline import remove_folder
from ..parallel.engine.wire import Progress, Ready
from ..parallel.errors import RankDiedError, UserError
from ..parallel.planning.limits import step_limit_s
from ..parallel.planning.plan import Plan
from .crew import Crew
from .keys import KEYS_VARIABLE
from .nodes import Meeting, interface_to
from .restarts import NO_RESTARTS, RESTARTS, Restarts

WORKER = "gptoss_launch.parallel.engine.worker"
SOCKET_PATH_BYTES = 107  # sun_path is 108 bytes with its closing zero (unix(7))
RANK_LOG = "rank-0.log"  # of a single rank; torchrun has names of its own
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # as torchrun sets them
ELSEWHERE_S = 1.0  # from a failure that follows from another to the other node's word for it
STOP_S = 2.5  # ranks have this long to end by themselves; with drain and kill the whole stays under 5 s


class Supervisor:
    """Use as `async with`: leaving it ends every process and removes the run folder.

    node: whose part of the plan runs here. meeting: of the ranks of a replica that lies on several nodes.
    worker: the module that every rank runs. worker_arguments: of its command line, beside those that every rank gets.
    on_progress: called with bytes read and bytes to read, over all ranks. say: takes what a person should read about
    replicas that die and come back. restarts: how often they may.
    """

    def __init__(
        self,
        plan: Plan,
        worker: str,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        worker_arguments: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: None,
        restarts: Restarts = RESTARTS,
        node: int = 0,
        meeting: Meeting | None = None,
    ) -> None:
        self._own, self._ranks = plan.replicas_of(node), plan.ranks_of(node)
        self._node = node
        self._meeting = meeting
        self._say = say
        # With one replica nobody would be served meanwhile, and whoever started us can restart all of it.
        self._restarts = restarts if plan.dp > 1 else NO_RESTARTS
        self._lives: Counter[int] = Counter()
        self._plan = plan
        self._single = plan.world_size == 1
        self._worker = worker
        self._worker_arguments = worker_arguments
        self._on_progress = on_progress
        self._progress: dict[tuple[int, int], Progress] = {}
        self._replicas: dict[int, Crew] = {}
        self._http: Crew | None = None

    async def __aenter__(self) -> "Supervisor":
        self.folder = run_folder()
        self.plan_file = self.folder / "plan.json"
        self._plan.save(self.plan_file)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(crew.stop(STOP_S) for crew in self._crews()))
        remove_folder(self.folder)

    def engine_socket(self, replica: int) -> Path:
        """Where the leader of this replica listens once it is ready, before and after a restart."""
        return self.folder / f"engine-{replica}.sock"

    async def start_replicas(self) -> None:
        for replica in self._own:
            self._replicas[replica] = crew = self._crew(replica)
            await self._start(replica, crew)

    async def start_http(
        self, listener: socket.socket, arguments: Sequence[str], nodes: socket.socket | None = None
    ) -> None:
        """Hands `listener` over to the HTTP process: it is closed here. arguments: more of its command line. nodes:
        where other nodes come in, handed over likewise."""
        control = self.folder / "http.sock"
        self._http = Crew(control, range(1), lambda rank: None)
        command = [sys.executable, "-m", "gptoss_launch.launch.api", "--control", str(control)]
        command += ["--fd", str(listener.fileno()), "--plan", str(self.plan_file), *arguments]
        for replica in self._own:
            command += ["--engine", str(self.engine_socket(replica))]
        with listener, nodes or nullcontext():
            command += [] if nodes is None else ["--nodes-fd", str(nodes.fileno())]
            command += [] if self._meeting is None else ["--meeting-port", str(self._meeting.port)]
            passed = [one.fileno() for one in (listener, nodes) if one is not None]
            await self._http.start(command, log=None, pass_fds=passed)

    async def ready(self) -> tuple[Ready, ...]:
        """What every rank measured, once all processes can work. Raises the UserError of the first that cannot."""
        failed = asyncio.create_task(self.first_failure())
        try:
            while missing := {crew.ready for crew in self._crews() if not crew.ready.done()}:
                await asyncio.wait({failed, *missing}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    raise failed.result()
        finally:
            failed.cancel()
        return tuple(answer for crew in self._replicas.values() for answer in self._checked(crew.ready.result()))

    async def failed(self) -> UserError:
        """Waits until the command cannot go on, and says why; to be called once all are ready. Restarts replicas
        meanwhile: it goes on while one that may live remains, and on the first of several nodes as long as the HTTP
        process lives, since others may come back at any time. A replica that lies on several nodes is not restarted.
        With nothing wrong it waits for ever."""
        if self._plan.span > 1:
            return await self.first_failure()
        kept: dict[asyncio.Future[UserError], int] = {
            asyncio.create_task(self._keep(replica)): replica for replica in self._own
        }
        http = {self._http.failed} if self._http else set()
        left = set(kept)
        here = " here" if self._plan.nodes > 1 else ""
        try:
            while True:
                done, _ = await asyncio.wait({*left, *http}, return_when=asyncio.FIRST_COMPLETED)
                left -= done
                error = next(iter(done & http or done)).result()
                if done & http or not (left or (http and self._plan.nodes > 1)):
                    return error
                gone = [kept[task] for task in done]
                await asyncio.gather(*map(self._clear, gone))
                names = " and ".join(f"replica {replica}" for replica in gone)
                most = f"{len(self._restarts.pauses_s)} restarts within {self._restarts.within_s:g} s"
                self._say(f"{names} died after {most}: {len(left)} of {len(kept)} replicas are left{here}: {error}")
        finally:
            for task in kept:
                task.cancel()
            await asyncio.gather(*kept, return_exceptions=True)

    async def first_failure(self) -> UserError:
        """Waits until any process ends that should not have, and says why. The cause may lie on another node, of which
        the HTTP process is told."""
        failures = {crew.failed for crew in self._crews()}
        done, left = await asyncio.wait(failures, return_when=asyncio.FIRST_COMPLETED)
        if self._plan.span > 1 and left and all(one.result().follows for one in done):
            done |= (await asyncio.wait(left, timeout=ELSEWHERE_S, return_when=asyncio.FIRST_COMPLETED))[0]
        return min((one.result() for one in done), key=lambda error: error.follows)

    async def _keep(self, replica: int) -> UserError:
        """Restarts one replica whenever it dies; returns why it died when that was too often."""
        begun_s: list[float] = []  # restarts
        error = await self._replicas[replica].failed
        while (pause_s := self._restarts.pause_s(begun_s, time.monotonic())) is not None:
            died_s = time.monotonic()
            count = f"{self._restarts.recent(begun_s, died_s) + 1} of {len(self._restarts.pauses_s)}"
            self._say(f"replica {replica} died, restart {count} in {pause_s:g} s: {error}")
            await self._clear(replica)
            await asyncio.sleep(pause_s)
            begun_s.append(time.monotonic())
            error = await self._revive(replica)
            if error is None:
                self._say(f"replica {replica} answers again, {time.monotonic() - died_s:.1f} s after it died")
                error = await self._replicas[replica].failed
        return error

    async def _revive(self, replica: int) -> RankDiedError | None:
        """Starts a replica that was cleared away. None once it is ready, or why it cannot be."""
        try:
            self._replicas[replica] = crew = self._crew(replica)
            await self._start(replica, crew)
        except OSError as error:
            return RankDiedError(f"replica {replica} cannot be restarted: {error}")
        await asyncio.wait({crew.ready, crew.failed}, return_when=asyncio.FIRST_COMPLETED)
        if crew.failed.done():
            # It could be started before, so it is no mistake in what was asked, which would exit with 2.
            error = crew.failed.result()
            known = isinstance(error, RankDiedError)
            return (
                error if known else RankDiedError(f"replica {replica} cannot be restarted: {error.message}", error.hint)
            )
        try:
            self._checked(crew.ready.result())
        except RankDiedError as error:
            return error
        return None

    async def drain(self, limit_s: float) -> None:
        """Lets the HTTP process finish the answers it is giving, for at most limit_s."""
        if self._http is not None:
            self._http.terminate()
            try:
                await asyncio.wait_for(self._http.gone(), limit_s)
            except TimeoutError:
                pass

    def _crews(self) -> list[Crew]:
        return [*([self._http] if self._http else []), *self._replicas.values()]

    def _crew(self, replica: int) -> Crew:
        """A new life of this replica, and its folder. The number of the life keeps whatever is late in an earlier one
        from meeting this one."""
        if self._single:
            log, limit_s = self.folder / RANK_LOG, step_limit_s(self._plan)
            return Crew(self.folder / "replica-0.sock", self._ranks, lambda rank: log, self._count(0), limit_s)
        self._lives[replica] += 1
        life = self.folder / f"replica-{replica}.{self._lives[replica]}"
        life.mkdir()
        control = life / f"replica-{replica}.sock"
        life.with_name(f"{life.name}.sock").symlink_to(control)
        limit_s, others = step_limit_s(self._plan), self._plan.span > 1
        return Crew(control, self._ranks, _log_finder(life, self._ranks), self._count(replica), limit_s, others)

    async def _start(self, replica: int, crew: Crew) -> None:
        life = crew.control.parent
        rank = rank_arguments(self._worker, self.plan_file, crew.control, self.engine_socket(replica))
        meeting = self._meeting and meeting_arguments(self._plan, self._node, self._meeting)
        own = replica_environment(
            self._plan, len(self._ranks), replica - self._own.start, os.environ.get("CUDA_VISIBLE_DEVICES")
        )
        if self._single:
            command, log = [sys.executable, "-u", *rank], life / RANK_LOG
            own |= SINGLE
        else:
            control = life.with_name(f"{life.name}.sock")
            command = [*torchrun_command(len(self._ranks), control, life, meeting or MEETING_HERE), *rank]
            log = life / "torchrun.log"
        environment = (meeting_environment(self._meeting) if self._meeting else {}) | os.environ | own
        environment.pop(KEYS_VARIABLE, None)  # no business of a rank's
        await crew.start([*command, *self._worker_arguments], log, environment=environment)

    async def _clear(self, replica: int) -> None:
        """Ends what is left of a replica's life and removes what it leaves."""
        crew = self._replicas[replica]
        await crew.stop(STOP_S)
        life = crew.control.parent
        await asyncio.to_thread(remove_folder, life)
        life.with_name(f"{life.name}.sock").unlink(missing_ok=True)
        self.engine_socket(replica).unlink(missing_ok=True)  # nobody can bind it while it is there

    def _checked(self, answers: tuple[Ready, ...]) -> tuple[Ready, ...]:
        for answer in answers:
            if answer.digest != self._plan.digest:
                raise RankDiedError(
                    f"rank {answer.rank} runs plan {answer.digest}, not {self._plan.digest}",
                    "one version of gptoss-launch must be installed for all ranks",
                )
        return answers

    def _count(self, replica: int) -> Callable[[Progress], None]:
        def count(progress: Progress) -> None:
            self._progress[replica, progress.rank] = progress
            everyone = self._progress.values()
            self._on_progress(sum(p.done_bytes for p in everyone), sum(p.total_bytes for p in everyone))

        return count


# Port 0: the rendezvous takes a free port of its own, so replicas never meet.
MEETING_HERE = (
    "--nnodes",
    "1",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "127.0.0.1:0",
    "--local-addr",
    "127.0.0.1",
)


def meeting_arguments(plan: Plan, node: int, meeting: Meeting) -> Sequence[str]:
    """Of torchrun, for the part of a replica on this node. Static: ranks are numbered in the order of the nodes."""
    place = node % plan.span
    where = ("--master-addr", meeting.host, "--master-port", str(meeting.port))
    return ("--nnodes", str(plan.span), "--node-rank", str(place), *where)


def meeting_environment(meeting: Meeting) -> dict[str, str]:
    """Which network gloo and NCCL take, unless they are told: the one that the nodes share. By themselves they go by
    the host's name, which often is an address that no other node reaches."""
    interface = interface_to(meeting.host)
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def torchrun_command(ranks: int, control: Path, logs: Path, meeting: Sequence[str]) -> list[str]:
    """The command line of one replica, or of its `ranks` on this node, up to what each of them runs.

    control: the control socket, as torchrun itself reaches it.
    """
    return [
        *(sys.executable, "-m", "gptoss_launch.launch.lifeline", str(control), "torch.distributed.run"),
        *(*meeting, "--nproc-per-node", str(ranks), "--max-restarts", "0"),
        *("--rdzv-id", logs.name, "--log-dir", str(logs), "--redirects", "3"),
    ]


def rank_arguments(worker: str, plan: Path, control: Path, listen: Path) -> list[str]:
    """What Python is given to run one rank."""
    return ["-m", worker, "--plan", str(plan), "--control", str(control), "--listen", str(listen)]


def replica_environment(plan: Plan, ranks: int, place: int, visible: str | None) -> dict[str, str]:
    """Environment variables that give a replica its own GPUs, of those in `visible` (CUDA_VISIBLE_DEVICES) or of all.
    ranks: of it on this node. place: its place among the replicas of this node.

    GPUs are numbered by bus, as the plan's machine has them; CUDA alone would put the fastest first. With
    expandable segments torch's allocator holds no freed blocks of sizes that do not come again, which no plan foresees.
    On a CPU torch's threads must not spin while they wait: those of our experts have the same CPUs.
    """
    if plan.device != "cuda":
        return {"OMP_WAIT_POLICY": "passive"}
    here = [str(index) for index in range(plan.world_size)] if visible is None else visible.split(",")
    own = here[place * ranks : (place + 1) * ranks]
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(own),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def run_folder() -> Path:
    """A new private folder in the temporary folder, or in /tmp where socket paths would not fit into sun_path."""
    longest = len("/gptoss-12345678/replica-99.9999/replica-99.sock")
    for base in (Path(tempfile.gettempdir()), Path("/tmp")):
        if len(bytes(base)) + longest <= SOCKET_PATH_BYTES:
            try:
                return Path(tempfile.mkdtemp(prefix="gptoss-", dir=base))  # mode 0700
            except OSError as error:
                raise UserError(
                    f"no run folder in {base}: {error.strerror}", "set TMPDIR to a writable folder"
                ) from None
    raise AssertionError("/tmp is short enough")


def _log_finder(logs: Path, ranks: range) -> Callable[[int], Path | None]:
    """torchrun names the file LOGS/<id>_<random>/attempt_0/<local rank>/stderr.log."""

    def find(rank: int) -> Path | None:
        if rank < 0:
            return logs / "torchrun.log"
        return next(logs.glob(f"*/attempt_0/{rank - ranks.start}/stderr.log"), None)

    return find
