"""What 8 bits for attention, embedding and head do to the answers: the model as it runs against the checkpoint's own
matrices, teacher-forced on a fixed set of prompts.

Both passes have the same experts, kernels and pages; the second reads the original matrices again, a layer at a time
(`model.originals`). Before the first request, on every rank of a replica.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.batch import one_sequence
from ..model.dtypes import TORCH_DTYPE
from ..model.forward import hidden_states
from ..model.originals import originals
from ..planning.headers import Entry
from .engine import Engine

ROWS = 8  # whose logits are compared at a time
PROMPTS = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Reasoning: low<|end|><|start|>user<|message|>What is 17 plus 25?<|end|><|start|>assistant<|channel|>analysis<|message|>\
17 plus 25 is 42.<|end|><|start|>assistant<|channel|>final<|message|>42<|end|><|start|>user<|message|>Write a function \
in Python that says whether a number is prime.<|end|><|start|>assistant<|channel|>final<|message|>def is_prime(n):
    if n < 2:
        return False
    for divisor in range(2, int(n ** 0.5) + 1):
        if n % divisor == 0:
            return False
    return True<|end|><|start|>user<|message|>Why is the sky blue?<|end|><|start|>assistant<|channel|>final<|message|>\
Air scatters short waves of light more than long ones, so that blue light reaches the eye from all over the sky, while \
red light goes straight on.<|end|><|start|>user<|message|>Traduis en français : the train leaves at noon.<|end|>\
<|start|>assistant<|channel|>final<|message|>Le train part à midi.<|end|><|start|>user<|message|>Weather in Bern?\
<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{"city": "Bern"}\
<|call|>"""


@dataclass(frozen=True)
class Drift:
    """From the model with the checkpoint's matrices: KL divergence in nats, the mean and the largest over the tokens;
    and after how many of them the likeliest next token is the same."""

    tokens: int
    mean_kl: float
    most_kl: float
    same_top1: int

    def __str__(self) -> str:
        return (
            f"mean KL divergence {self.mean_kl:.2g} nats, largest {self.most_kl:.2g}, the same likeliest token after "
            f"{self.same_top1} of {self.tokens}"
        )


def fixed_tokens(folder: Path) -> list[int]:
    """The prompts, by the checkpoint's tokenizer."""
    import tokenizers  # here: only a rank that compares needs it

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPTS, add_special_tokens=False).ids


def checked(engine: Engine, rank: int, inventory: Mapping[str, Entry]) -> str:
    """What is said of the plan's rest. Raises UserError where the plan's limit is passed."""
    plan = engine.plan
    assert plan.checkpoint is not None
    found = drift(engine, rank, inventory, fixed_tokens(Path(plan.checkpoint)))
    text = f"rest {plan.rest} against {plan.dtype} on fixed prompts: {found}"
    if not found.mean_kl <= plan.rest_kl:  # also where it is no number
        raise UserError(
            f"{text}: more than the limit of {plan.rest_kl:g}",
            "--rest int8 is the finer one, --rest bf16 leaves the weights as they are; --rest-kl NATS sets the limit",
        )
    return f"{text}; the limit is {plan.rest_kl:g}"


@torch.inference_mode()
def drift(engine: Engine, rank: int, inventory: Mapping[str, Entry], tokens: list[int]) -> Drift:
    """Over as many of `tokens` as the engine can have in one step. Writes into pages that no request has yet."""
    plan, weights, device = engine.plan, engine.weights, engine.device
    pages = engine.sizes.scratch_page // 2
    count = min(len(tokens), plan.step_tokens, plan.context_tokens, pages * plan.page_tokens)
    tokens_T = torch.tensor(tokens[:count], device=device)
    batch = one_sequence(tokens_T, plan.spec, plan.page_tokens)
    after = engine.frequencies, engine.kv_LPCSKD, batch, TORCH_DTYPE[plan.residual_dtype]
    x_TH = hidden_states(plan.spec, weights, weights.layers, engine.ops, engine.comm, *after)
    those = originals(plan, rank, inventory, weights)
    tokens_U, places_T = tokens_T.unique(return_inverse=True)
    embedding = replace(weights, embed_VH=those.embedding(tokens_U), first_token=0)
    after = engine.frequencies, engine.kv_LPCSKD, replace(batch, tokens_T=places_T), after[-1]
    y_TH = hidden_states(plan.spec, embedding, those.layers(), engine.ops, engine.comm, *after)
    wanted_TV = torch.cat([engine.ops.linear(y_TH, tile).cpu() for tile in those.head()], dim=1)
    kl_T, same_T = [], []
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        kl, same = compared(engine, wanted_TV[rows].to(device).float(), engine.ops.linear(x_TH[rows], weights.head_VH))
        kl_T.append(kl)
        same_T.append(same)
    kl = torch.cat(kl_T)
    return Drift(count, float(kl.mean()), float(kl.max()), int(torch.cat(same_T).sum()))


def compared(engine: Engine, wanted_SV: Tensor, found_SV: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence of each row's distribution from the wanted one, and whether the likeliest token is the same; of
    logits over this rank's part of the vocabulary."""
    found_SV, gather = found_SV.float(), engine.comm.all_gather
    wanted_S, found_S = gather(torch.stack([wanted_SV.logsumexp(1), found_SV.logsumexp(1)])).logsumexp(0)
    shares_SV = (wanted_SV - wanted_S[:, None]).exp()
    kl_S = gather((shares_SV * (wanted_SV - found_SV)).sum(1)).sum(0) - wanted_S + found_S
    first, second = (_likeliest(one, engine.weights.first_token, gather) for one in (wanted_SV, found_SV))
    return kl_S, first == second


def _likeliest(logits_SV: Tensor, first_token: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Ids; of equal logits the lowest rank's."""
    top_S, at_S = logits_SV.max(1)
    tops_RS, ids_RS = gather(top_S), gather(at_S + first_token)
    return ids_RS.gather(0, tops_RS.argmax(0, keepdim=True))[0]
