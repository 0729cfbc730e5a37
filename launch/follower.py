"""A node of several that is not the first: it is told the plan, runs its own replicas, and puts the head through to
them; or its part of a replica whose leader is elsewhere.

When the head is lost, its replicas stay for a while, until it is there again; a part of one ends. Runs until the head
says that nothing is asked of it any more. Knows no HTTP, and of requests only that they pass.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import click

from ..parallel.engine.wire import Assigned, Failed, Leave, Stop, encode
from ..parallel.errors import RankDiedError, UserError
from ..parallel.planning.plan import Plan
from .engine_client import Connection
from .loading import memory_lines, note_lines, progress_bar
from .node_link import join_head, keep_linked, next_message
from .nodes import Meeting, Nodes, work_names
from .resolve import check_gpus, resolve
from .restarts import RESTARTS, Restarts
from .stop import StopSignals, until
from .supervise import ELSEWHERE_S, Supervisor
from .version import own_version

JOIN_LIMIT_S = 600.0  # for the first time, as torchrun's rendezvous
REJOIN_LIMIT_S = 60.0  # GPUs are held for nobody meanwhile


class Membership:
    """This node's place at the head, which gave it `assigned`. part: whether it has a part of a replica, which is over
    when the head is lost."""

    def __init__(
        self,
        nodes: Nodes,
        connection: Connection,
        assigned: Assigned,
        say: Callable[[str], None],
        part: bool = False,
    ) -> None:
        self._nodes = nodes
        self._part = part
        self._failure: UserError | None = None
        self._connection: Connection | None = connection  # None while the head is lost
        self._assigned = assigned
        self._say = say

    async def keep(self) -> None:
        """Returns once nothing is asked of this node any more. Raises RankDiedError when the head stays lost, or what
        was told it."""
        try:
            while self._connection is not None:
                word = await next_message(self._connection[0])
                if self._failure is not None:
                    raise self._failure
                if isinstance(word, Stop):
                    return
                if isinstance(word, Failed):
                    raise RankDiedError(word.message, word.hint)
                if self._part:
                    message = f"head {self._nodes.head} is lost, and with it the other ranks of the replica"
                    raise RankDiedError(message, "start all nodes again")
                await self._rejoin()
        finally:
            self._hang_up()

    def tell(self, error: UserError) -> None:
        """The head: why this node's part is over."""
        self._failure = error
        if self._connection is not None:
            failed = Failed(-1, error.message, error.hint, error.exit_code, error.follows)
            self._connection[1].write(encode(failed))

    async def _rejoin(self) -> None:
        head = self._nodes.head
        self._hang_up()
        self._say(f"head {head} is lost; it is looked for during {REJOIN_LIMIT_S:g} s")
        self._connection, assigned = await join_head(self._nodes, REJOIN_LIMIT_S, self._say)
        if assigned != self._assigned:
            raise RankDiedError(f"head {head} runs another plan now", "start this node again")
        self._say(f"head {head} is there again")

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    def leave(self) -> bool:
        """Asks the head to let this node go; False where there is none to be asked."""
        if self._connection is not None:
            self._connection[1].write(encode(Leave()))
        return self._connection is not None


async def follow(
    nodes: Nodes,
    model: str,
    drain_s: float,
    worker: str,
    *,
    worker_arguments: Sequence[str] = (),
    restarts: Restarts = RESTARTS,
) -> None:
    """Runs until the head or a signal ends it. model: where the weights are here. worker: the module of every rank.

    Raises UserError for what keeps it from starting, RankDiedError when its last replica dies or the head stays lost.
    """

    def say(text: str) -> None:
        click.echo(text, err=True)

    with StopSignals().caught() as stop, progress_bar() as bar:
        joined = await until(join_head(nodes, JOIN_LIMIT_S, say), stop.first)
        if joined is None:
            return
        plan = plan_here(joined[1], nodes, model)
        membership = Membership(nodes, *joined, say, plan.span > 1)
        say(
            f"node {nodes.rank} of {nodes.count} has joined head {nodes.head}: "
            f"{work_names(plan, nodes.rank)} of {plan.dp}"
        )
        meeting = Meeting(nodes.host, joined[1].meeting_port) if plan.span > 1 else None
        async with Supervisor(
            plan, worker, bar.show, worker_arguments, say, restarts, nodes.rank, meeting
        ) as supervisor:
            await supervisor.start_replicas()
            leads = plan.replicas_of(nodes.rank) if 0 in plan.ranks_of(nodes.rank) else ()
            links = [keep_linked(nodes, replica, supervisor.engine_socket(replica)) for replica in leads]
            works = [membership.keep(), _run(supervisor, plan, nodes.rank, membership, say, bar.stop), *links]
            ended = asyncio.ensure_future(_first(works))
            await asyncio.wait({ended, stop.first}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and membership.leave():
                say(f"leaving: running answers get {drain_s:g} s; a second signal ends at once")
                await asyncio.wait({ended, stop.second}, timeout=drain_s + 1, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
            if not ended.cancelled():
                ended.result()


def plan_here(assigned: Assigned, nodes: Nodes, model: str) -> Plan:
    """The head's plan with the weights of this node. Raises UserError."""
    if assigned.version != own_version():
        message = f"head {nodes.head} runs gptoss-launch {assigned.version}, this node {own_version()}"
        raise UserError(message, "install the same version on every node")
    plan = Plan.from_json(json.loads(assigned.plan))
    if plan.nodes != nodes.count:
        raise UserError(f"--nnodes {nodes.count}, and the head's plan is for {plan.nodes}", "the same on every node")
    spec, folder = resolve(model, need_weights=True)
    if spec != plan.spec:
        raise UserError(f"{model} here is another model than {plan.model} of the head", "the same on every node")
    check_gpus(plan, nodes.rank, "nodes must be alike; --dp N or --ranks R on the head asks for less")
    return replace(plan, checkpoint=str(folder))


async def _run(
    supervisor: Supervisor,
    plan: Plan,
    node: int,
    membership: Membership,
    say: Callable[[str], None],
    loaded: Callable[[], None],
) -> None:
    """Raises what keeps the replicas from starting, or ends the last of them."""
    try:
        answers = await supervisor.ready()
        loaded()
        for line in (*memory_lines(plan, answers, node), *note_lines(answers)):
            say(line)
        raise await supervisor.failed()
    except UserError as error:
        if plan.span > 1:
            membership.tell(error)
            await asyncio.sleep(ELSEWHERE_S)  # the head ends this node meanwhile
        raise


async def _first(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Until one of them returns or raises; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
