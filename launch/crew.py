"""One started command and the processes it starts in turn, all on one control socket: a replica's torchrun with its
ranks, a single rank, or the HTTP process.

Who is there is what is connected: a connection that ends is a process that ended, whatever the reason. Does not know
what the processes are for.
"""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..parallel.engine.trace import Where, read_where, trace_file
from ..parallel.engine.wire import Decoder, Failed, Hello, Message, Progress, Ready
from ..parallel.errors import NoPlanError, RankDiedError, UserError

TAIL_LINES = 15
SETTLE_S = 0.3  # from the first sign of a failure to naming its cause
WATCH_EVERY_S = 0.5
KILL_S = 1.0  # a killed process is gone by then, unless the kernel itself is stuck


@dataclass(eq=False)
class _Member:
    """One connected process."""

    hello: Hello
    writer: asyncio.StreamWriter
    doing: str = "starting"
    failed: bool = False  # it has said why it ends

    @property
    def name(self) -> str:
        who = {"rank": f"rank {self.hello.rank}", "http": "the HTTP process"}.get(self.hello.role, "torchrun")
        return f"{who} on {self.hello.host}"


class Crew:
    """A command under supervision.

    control: where its processes reach us. ranks: those that make it ready once each is. log_of: a rank's log file (-1:
    the command's own), read only to say why it died; None when the log went to the terminal. step_limit_s: a rank that
    is longer in one step hangs; None for a command without ranks. others: whether the ranks work with some of other
    crews. `ready` and `failed` are futures; `failed` holds the error as a value.
    """

    def __init__(
        self,
        control: Path,
        ranks: Sequence[int],
        log_of: Callable[[int], Path | None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
        step_limit_s: float | None = None,
        others: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[tuple[Ready, ...]] = loop.create_future()
        self.failed: asyncio.Future[UserError] = loop.create_future()
        self.control = control
        self._ranks = ranks
        self._others = others
        self._log_of = log_of
        self._on_progress = on_progress
        self._step_limit_s = step_limit_s
        self._reasons: list[UserError] = []
        self._members: list[_Member] = []
        self._greeted: set[int] = set()
        self._answers: dict[int, Ready] = {}
        self._stopping = False
        self._server: asyncio.Server | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watches: list[asyncio.Task[None]] = []

    async def start(
        self,
        command: Sequence[str],
        log: Path | None,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts `command`, in a session of its own: Ctrl-C in a terminal reaches the supervisor alone.

        log: where its output goes; None for standard error. environment: None for our own.
        """
        self._server = await asyncio.start_unix_server(self._serve, self.control)
        output = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600) if log else os.dup(2)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=pass_fds,
                env=environment,
            )
        finally:
            os.close(output)
        self._watches = [asyncio.create_task(self._wait_for(self._process))]
        if self._step_limit_s is not None:
            self._watches.append(asyncio.create_task(self._watch_steps(self._step_limit_s)))

    def terminate(self) -> None:
        """Asks the command to end in its own time (SIGTERM)."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def gone(self) -> None:
        """Returns once the command and everything it started have ended."""
        while self._alive():
            await asyncio.sleep(0.01)

    async def stop(self, grace_s: float) -> None:
        """Ends everything: SIGTERM for the command, and the lifelines of ranks and HTTP process, so that a torchrun
        still collects its ranks; after grace_s, SIGKILL for whatever is left."""
        self.terminate()
        for member in self._members:
            if member.hello.role in ("rank", "http"):
                _hang_up(member.writer)
        if not await self._gone_within(grace_s):
            for member in self._members:
                if member.hello.host == socket.gethostname():
                    # Still connected, so the process lives and the number is still its own.
                    os.kill(member.hello.pid, signal.SIGKILL)
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
            await self._gone_within(KILL_S)
        if self._server is not None:
            self._server.close()
        for watch in self._watches:
            watch.cancel()
        for member in self._members:
            member.writer.close()

    def _alive(self) -> bool:
        return bool(self._members) or (self._process is not None and self._process.returncode is None)

    async def _gone_within(self, limit_s: float) -> bool:
        try:
            await asyncio.wait_for(self.gone(), limit_s)
        except TimeoutError:
            return False
        return True

    async def _wait_for(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self._fail(RankDiedError(f"{self.control.stem} ended with exit code {code}", self._tail(-1), follows=True))

    async def _watch_steps(self, limit_s: float) -> None:
        """Fails the crew when a rank is longer in one step than limit_s, and names who holds up the others: the rank
        that is least far, and of several the one that is stopped."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            places = {member: self._where(member.hello.rank) for member in self._members if member.hello.role == "rank"}
            working = {member: where for member, where in places.items() if where is not None and where.step}
            now_s = time.monotonic()
            late = [where for where in working.values() if where.phase != "idle" and now_s - where.since_s > limit_s]
            if not late:
                continue
            least = min(where.progress for where in working.values())
            stuck = [member for member in working if working[member].progress == least]
            stopped = [member for member in stuck if _is_stopped(member.hello)]
            stuck = stopped or stuck
            waits = self._others and not stopped and all(working[one].phase == "collective" for one in stuck)
            names = " and ".join(member.name for member in stuck)
            others = "; ".join(f"{member.name} is {where}" for member, where in working.items() if member not in stuck)
            hint = "\n".join(part for part in (others, self._tail(stuck[0].hello.rank)) if part)
            verb = "hangs" if len(stuck) == 1 else "hang"
            message = f"{names} {verb} {working[stuck[0]]}: a step may take {limit_s:.0f} s"
            self._fail(RankDiedError(message, hint, follows=waits))
            return

    def _where(self, rank: int) -> Where | None:
        return read_where(trace_file(self.control, rank))

    def _doing(self, member: _Member) -> str:
        """What the member was at, for the message that says it is gone."""
        where = self._where(member.hello.rank) if member.hello.role == "rank" else None
        if where is not None and where.phase in ("step", "collective"):
            return str(where)
        return "while serving" if self.ready.done() else f"while {member.doing}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        member: _Member | None = None
        try:
            while data := await reader.read(1 << 16):
                for message in decoder.feed(data):
                    if isinstance(message, Hello):
                        member = _Member(message, writer)
                        self._greeted.add(message.rank)
                        self._members.append(member)
                        if self._stopping and message.role in ("rank", "http"):
                            _hang_up(writer)
                    elif member is not None:
                        self._take(member, message)
        except (OSError, ValueError):
            pass  # a broken connection is an ended one
        finally:
            writer.close()
            if member is not None:
                self._members.remove(member)
                if not member.failed:
                    message = f"{member.name} died {self._doing(member)}"
                    tail = self._tail(member.hello.rank)
                    self._fail(RankDiedError(message, tail, follows=member.hello.role != "rank"))

    def _take(self, member: _Member, message: Message) -> None:
        if isinstance(message, Progress):
            member.doing = f"loading ({message.done_bytes / 1e9:.1f} of {message.total_bytes / 1e9:.1f} GB read)"
            self._on_progress(message)
        elif isinstance(message, Ready):
            member.doing = "serving"
            self._answers[message.rank] = message
            if len(self._answers) == len(self._ranks) and not self.ready.done():
                self.ready.set_result(tuple(self._answers[rank] for rank in sorted(self._answers)))
        elif isinstance(message, Failed):
            member.failed = True
            # What a person can put right speaks for itself; anything else needs the log.
            speaks = message.exit_code in (UserError.exit_code, NoPlanError.exit_code)
            hint = "\n".join(part for part in (message.hint, "" if speaks else self._tail(message.rank)) if part)
            if speaks:
                error = UserError(message.message, hint)
                error.exit_code = message.exit_code
            elif message.exit_code == RankDiedError.exit_code:  # of another rank than the one that says it
                error = RankDiedError(message.message, message.hint, message.follows)
            else:
                said = f"{member.name} failed {self._doing(member)}: {message.message}"
                error = RankDiedError(said, hint, message.follows)
            self._fail(error)

    def _fail(self, error: UserError) -> None:
        """Keeps the first cause; what follows from it is noise. When one rank dies, what the others say about their
        broken collective can come first, so the cause has SETTLE_S to turn up."""
        if self._stopping or self.failed.done():
            return
        self._reasons.append(error)
        if len(self._reasons) == 1:
            asyncio.get_running_loop().call_later(SETTLE_S, self._settle)

    def _settle(self) -> None:
        if not self.failed.done():
            self.failed.set_result(min(self._reasons, key=lambda reason: reason.follows))

    def _tail(self, rank: int) -> str:
        """The last lines of a rank's log. -1: of a rank that ended before it said hello, else the command's own."""
        silent = [one for one in self._ranks if one not in self._greeted]
        for one in [rank] if rank >= 0 else [*silent, -1]:
            path = self._log_of(one)
            if path is not None and (lines := _last_lines(path)):
                whose = f"the log of rank {one}" if one >= 0 else "its log"
                return f"{whose} ended with\n" + "\n".join(f"  | {line}" for line in lines)
        return ""


def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Ends our direction alone: the process sees the end, and its own closing still tells us when it is gone."""
    try:
        writer.write_eof()
    except OSError:
        pass  # gone already


def _is_stopped(hello: Hello) -> bool:
    """Whether a process of this host is stopped, by a signal or a debugger; False where that cannot be seen."""
    try:
        state = Path(f"/proc/{hello.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t") and hello.host == socket.gethostname()


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-TAIL_LINES:]
