"""The plan: joins the choice of layout, the memory it takes and the reasons for it. Or says why there is none.

A pure function of (Spec, Machine, Asked). Probes nothing and starts nothing.
"""

import dataclasses

from ..errors import UserError
from .choice import FREE, Asked, check_layout, choose, find_place, with_overrides
from .layouts import RESIDUAL, memories, shortfall, widest
from .machine import Machine
from .placement import Order, Routing, place_experts
from .plan import Plan
from .reasons import no_plan, why
from .spec import Spec


def plan(spec: Spec, machine: Machine, asked: Asked = FREE, *, model: str, checkpoint: str | None = None) -> Plan:
    """The plan for `model`, or NoPlanError with what was tried, the shortfall and the smallest change that would fit.

    Raises UserError where what was asked is impossible on this machine whatever its memory, such as a context beyond
    the model's.
    """
    found, machine = machine, with_overrides(machine, asked)
    if asked.context_tokens is not None and asked.context_tokens > spec.max_context_tokens:
        raise UserError(
            f"--context {asked.context_tokens} is more than the model's {spec.max_context_tokens} tokens",
            f"ask for at most {spec.max_context_tokens}",
        )
    place = find_place(machine, asked)
    check_layout(spec, machine, place, asked)
    choice = choose(spec, place, asked)
    if choice is None:
        raise no_plan(spec, found, machine, place, asked)
    mesh, context = choice.layout.mesh, choice.layout.context_tokens
    room = widest(spec, place, choice.layout, asked.sequences)
    if shortfall(spec, place, choice.layout, room):
        fitting = widest(spec, place, choice.layout, None).sequences
        raise UserError(
            f"--sequences {room.sequences} at a time do not fit beside a context of {context} tokens",
            f"--sequences {fitting} fits; so may more with a smaller --context",
        )
    replica = memories(spec, place, mesh, room)
    orders = _orders(asked.routing, mesh.ep)
    world = [
        dataclasses.replace(row, rank=index * mesh.ranks + row.rank) for index in range(choice.dp) for row in replica
    ]
    return Plan(
        model=model,
        checkpoint=checkpoint,
        spec=spec,
        machine=machine.name,
        device=place.device,
        dp=choice.dp,
        ranks=mesh.ranks,
        ep=mesh.ep,
        dtype=place.dtype,
        residual_dtype=RESIDUAL[place.dtype],
        kv_dtype=place.kv_dtype,
        kernels=place.kernels,
        offload="none",
        context_tokens=context,
        sequences=room.sequences,
        kv_tokens=room.kv_tokens,
        page_tokens=room.page_tokens,
        step_tokens=room.step_tokens,
        memory=tuple(world),
        why=tuple(why(spec, found, place, asked, choice, room, replica, orders)),
        workload=asked.workload,
        nodes=choice.nodes,
        expert_order=orders,
    )


def _orders(routing: Routing | None, ep: int) -> tuple[Order, ...]:
    """The order of experts in each layer; () where the published one is kept in all of them."""
    if routing is None or ep == 1:
        return ()
    orders = tuple(place_experts(counts, ep) for counts in routing.counts)
    return () if all(order == tuple(range(len(order))) for order in orders) else orders
