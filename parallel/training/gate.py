"""The first loss, before anything has been trained: is it what the model that is served would lose?

Weights that did not load, or a forward pass that computes something else, show here, at the price of one short pass.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CheckError
from ..kernels import PLAIN
from ..kernels.batch import one_sequence
from ..kernels.rope import inverse_frequencies
from ..model.comm import Alone
from ..model.forward import hidden_states
from ..model.weights import Weights
from ..planning.pages import layers_per_page
from ..planning.spec import Spec
from .batch import Pack, make_pack
from .forward import embedded
from .model import whole
from .samples import Sample, sample

TOKENS = 512  # of one document are looked at
NEAR_CHANCE = 0.9  # of ln(vocabulary), what a model that knows nothing loses
MOST_TIMES = 2.0


@torch.no_grad()
def serving_logits(spec: Spec, weights: Weights, tokens_T: Tensor, residual_dtype: torch.dtype) -> Tensor:
    """Logits [T, V] after each token, by the pass that serves: one sequence, one page for each kind of layer. tokens_T:
    in host memory, as the embedding is."""
    device, tokens = weights.norm_H.device, len(tokens_T)
    batch = one_sequence(torch.arange(tokens, device=device), spec, tokens)
    weights = replace(weights, embed_VH=embedded(whole(weights.embed_VH), tokens_T, device))  # a row for each token
    kv_LPCSKD = torch.zeros(
        (layers_per_page(spec), len(batch.pages), 2, tokens, spec.kv_heads, spec.head_dim),
        dtype=weights.embed_VH.dtype,
        device=device,
    )
    frequencies = inverse_frequencies(spec).to(device)
    where = frequencies, kv_LPCSKD, batch, residual_dtype
    x_TH = hidden_states(spec, weights, weights.layers, PLAIN, Alone(), *where)
    return PLAIN.linear(x_TH, weights.head_VH)


def first_document(samples: Sequence[Sample], device: torch.device) -> Pack:
    """The first TOKENS of the first sample in which anything is learnt from them; where all prompts are longer than
    that, TOKENS round the first that is learnt."""
    early = (one for one in samples if any(one.weights[:TOKENS]))
    one = next(early, None) or next((one for one in samples if any(one.weights)), samples[0])
    learnt = next((place for place, weight in enumerate(one.weights) if weight), 0)
    low = 0 if learnt < TOKENS else learnt - TOKENS // 2
    return make_pack([sample(one.tokens[low : low + TOKENS], one.weights[low : low + TOKENS])], device)


def serving_loss(spec: Spec, weights: Weights, document: Pack, residual_dtype: torch.dtype) -> float:
    """Mean loss of a single document, by the pass that serves."""
    logits = serving_logits(spec, weights, document.tokens_T, residual_dtype)[document.learnt_R].float()
    nll = torch.nn.functional.cross_entropy(logits, document.targets_R, reduction="none")
    return (nll * document.weights_R).sum().item() / document.weight


def check_first_loss(loss: float, serving: float | None, vocab: int) -> None:
    """Raises CheckError where the weights look random, or training computes something else than serving.

    loss: of training, on the document of `serving`; None where nothing is loaded that could serve.
    """
    chance = math.log(vocab)
    hint = "look at the data (--preview 1) and the checkpoint; first_loss=ignore starts all the same"
    if loss > NEAR_CHANCE * chance:
        raise CheckError(f"first loss {loss:.2f}, near ln(vocabulary) {chance:.2f}: the model knows nothing", hint)
    if serving is not None and loss > MOST_TIMES * serving:
        raise CheckError(
            f"first loss {loss:.2f}, over {MOST_TIMES:g} x the {serving:.2f} of the pass that serves", hint
        )
