"""The plan: joins the choice of layout, the memory it takes and the reasons for it. Or says why there is none.

A pure function of (Spec, Machine, Asked). Probes nothing and starts nothing.
"""

import dataclasses

from ..errors import UserError
from .choice import (
    FREE,
    Asked,
    candidates,
    check_layout,
    choose,
    choose_among,
    find_place,
    on_cpu,
    with_overrides,
)
from .layouts import RESIDUAL, SMALLEST_CONTEXT_TOKENS, Place, memories, shortfall, widest
from .machine import Machine
from .offload import ahead, hot_experts, in_memory, one_rank, room_for, ways
from .placement import Order, Routing, place_experts
from .plan import Offload, Plan, Way
from .reasons import no_plan, why, why_offloaded, with_rest
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
    if choice is None and nothing_fits(spec, place, asked):
        offloaded = _offloaded(spec, found, machine, place, asked, model, checkpoint) if one_rank(asked) else None
        if offloaded is not None:
            return offloaded
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
        rest=asked.rest,
        rest_kl=asked.rest_kl,
    )


def nothing_fits(spec: Spec, place: Place, asked: Asked) -> bool:
    """Whether no context, however short, would fit without offload, in any layout inside a node."""
    shortest = min(SMALLEST_CONTEXT_TOKENS, spec.max_context_tokens, asked.context_tokens or SMALLEST_CONTEXT_TOKENS)
    free = dataclasses.replace(asked, context_tokens=shortest, ranks=None, ep=None, dp=None)
    return choose_among(spec, place, free, candidates(spec, place, free, shortest)) is None


def _offloaded(
    spec: Spec, found: Machine, machine: Machine, place: Place, asked: Asked, model: str, checkpoint: str | None
) -> Plan | None:
    """The plan of one rank that does not hold all experts on its device; None if not even the rest fits."""
    here = ways(spec, place, machine.speeds, asked)
    if not here:
        return None
    others: tuple[Way, ...] = tuple(one.way for one in here[1:])
    if place.device == "cuda":
        on_the_cpu = _on_the_cpu(spec, machine, asked)
        if asked.misses is None and on_the_cpu is not None and on_the_cpu.tok_s > here[0].way.tok_s:
            return plan(spec, found, dataclasses.replace(asked, gpu_memory_bytes=0), model=model, checkpoint=checkpoint)
        others += () if on_the_cpu is None else (on_the_cpu,)
    taken, narrow = here[0], find_place(machine, dataclasses.replace(asked, rest="int8"))
    in_8_bits = () if asked.rest != "bf16" or narrow.unpacks else ways(spec, narrow, machine.speeds, asked)
    way = taken.way
    hot = hot_experts(asked.routing, way.slots)
    chosen = Offload(way, others, hot, ahead(spec, way.misses, way.slots, asked))
    nodes = place.nodes if asked.dp is None else 1  # a replica, which is one rank, on each
    return Plan(
        model=model,
        checkpoint=checkpoint,
        spec=spec,
        machine=machine.name,
        device=place.device,
        dp=nodes,
        ranks=1,
        ep=1,
        dtype=place.dtype,
        residual_dtype=RESIDUAL[place.dtype],
        kv_dtype=place.kv_dtype,
        kernels=place.kernels,
        offload=chosen,
        context_tokens=taken.room.context_tokens,
        sequences=taken.room.sequences,
        kv_tokens=taken.room.kv_tokens,
        page_tokens=taken.room.page_tokens,
        step_tokens=taken.room.step_tokens,
        memory=tuple(dataclasses.replace(taken.memory, rank=rank) for rank in range(nodes)),
        why=(
            *why_offloaded(spec, found, machine, place, asked, chosen, taken.room, taken.memory),
            *(with_rest(one.way) for one in in_8_bits[:1]),
        ),
        workload=asked.workload,
        nodes=nodes,
        rest=asked.rest,
        rest_kl=asked.rest_kl,
    )


def _on_the_cpu(spec: Spec, machine: Machine, asked: Asked) -> Way | None:
    """The fastest way without the GPU, to compare with; None if none fits, or what was asked for is a GPU's."""
    gpus_alone = asked.kernels is not None or asked.dtype == "fp16" or asked.rest == "fp8"
    if gpus_alone or machine.host_memory_bytes is None:
        return None
    place, context = on_cpu(machine, asked), room_for(spec, asked).context_tokens
    if choose(spec, place, dataclasses.replace(asked, context_tokens=context)) is not None:
        return in_memory(spec, place, machine.speeds, context)
    found = ways(spec, place, machine.speeds, asked)
    return found[0].way if found else None


def _orders(routing: Routing | None, ep: int) -> tuple[Order, ...]:
    """The order of experts in each layer; () where the published one is kept in all of them."""
    if routing is None or ep == 1:
        return ()
    orders = tuple(place_experts(counts, ep) for counts in routing.counts)
    return () if all(order == tuple(range(len(order))) for order in orders) else orders
