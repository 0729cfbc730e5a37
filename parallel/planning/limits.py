"""How long a step may take before it counts as a hang. Knows the plan; measures nothing."""

from .plan import Plan
from .shards import table

LEAST_S = 10.0  # a collective that waits for so long for anything but arithmetic waits for a rank that is gone
# Multiply-adds a second that the slowest machine still reaches with plain operations, far below what any is made for:
# a bound must never end a step that goes on.
SLOWEST_FLOPS = {"cuda": 1e12, "cpu": 1e9}


def step_limit_s(plan: Plan) -> float:
    """LEAST_S and the time of the largest step at SLOWEST_FLOPS: 2 operations a token for each weight it meets."""
    spec = plan.spec
    experts = (
        sum(row.shape[0] * row.shape[1] * spec.hidden for row in table(spec) if row.name.endswith("up.bias")) * 1.5
    )
    others = sum(row.nbytes / 2 for row in table(spec) if row.dtype == "BF16" and ".weight" in row.published)
    active = others + experts * spec.experts_per_token / spec.experts
    return LEAST_S + 2 * active * plan.step_tokens / SLOWEST_FLOPS[plan.device]
