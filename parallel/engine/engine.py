"""The engine: one function, generate(Request) -> stream of Token, over this rank's share of the model.

Purely token ids; it knows no text. One request at a time: the prompt in chunks of the plan's step_tokens, then a
token a step.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import Operations
from ..kernels.batch import Batch, Chunk, tiles
from ..kernels.rope import inverse_frequencies
from ..kernels.sample import Draws, Wanted
from ..model.comm import Comm
from ..model.dtypes import TORCH_DTYPE
from ..model.forward import forward
from ..model.weights import Weights
from ..planning.pages import layers_per_page, local_kv_heads, pool_pages
from ..planning.plan import Plan
from . import kv
from .request import Request, Token


class Engine:
    """Weights, the KV pool and what a step needs besides. `plan` is resolved; nothing is detected here."""

    def __init__(self, plan: Plan, rank: int, weights: Weights, ops: Operations, comm: Comm) -> None:
        spec = plan.spec
        self.plan, self.weights, self.ops, self.comm = plan, weights, ops, comm
        self.device = weights.embed_VH.device
        self.frequencies = inverse_frequencies(spec).to(self.device)
        pages = pool_pages(spec, plan.kv_tokens, plan.step_tokens, plan.page_tokens)
        heads = local_kv_heads(spec, plan.mesh, rank)
        self.pool = kv.Pool.of(pages)
        # zeros, not empty: the bytes are really taken now, and a page never holds what another process left there
        self.kv_LPCSKD = torch.zeros(
            (layers_per_page(spec), pages, 2, plan.page_tokens, heads, spec.head_dim),
            dtype=TORCH_DTYPE[plan.kv_dtype],
            device=self.device,
        )

    def refusal(self, request: Request) -> str | None:
        """Why this request can never run here, with the numbers; None if it can."""
        prompt, limit = len(request.prompt_tokens), min(self.plan.context_tokens, self.plan.kv_tokens)
        vocab = self.plan.spec.vocab
        if not prompt or request.max_tokens < 1:
            return f"{prompt} prompt tokens and max_tokens {request.max_tokens}: both must be at least 1"
        if not all(0 <= token < vocab for token in request.prompt_tokens):
            outside = next(token for token in request.prompt_tokens if not 0 <= token < vocab)
            return f"token id {outside} is outside the vocabulary of {vocab}"
        if prompt + request.max_tokens > limit:
            return f"{prompt} prompt tokens and max_tokens {request.max_tokens} exceed the context of {limit}"
        return None

    def generate(self, request: Request) -> Generator[Token]:
        """Tokens as they are drawn; closing the stream frees its pages. Raises UserError for what `refusal` names."""
        reason = self.refusal(request)
        if reason is not None:
            raise UserError(reason, "shorten the prompt or lower max_tokens")
        sequence = kv.Sequence()
        try:
            logits_SV = self.prefill(sequence, request.prompt_tokens)
            for index in range(request.max_tokens):
                drawn = self._draw(logits_SV, request, sequence.length)
                if drawn in request.stop_tokens:
                    yield Token(request.id, drawn, "stop")
                    return
                if index == request.max_tokens - 1:
                    yield Token(request.id, drawn, "length")
                    return
                yield Token(request.id, drawn)
                logits_SV = self.step(sequence, (drawn,))
        finally:
            kv.release(self.pool, sequence)

    def prefill(self, sequence: kv.Sequence, tokens: Sequence[int]) -> Tensor:
        """Logits [1, V] after the last of `tokens`, which go through the model in chunks."""
        chunk = self.plan.step_tokens
        for start in range(0, len(tokens) - chunk, chunk):
            self.step(sequence, tokens[start : start + chunk])
        return self.step(sequence, tokens[(len(tokens) - 1) // chunk * chunk :])

    @torch.inference_mode()
    def step(self, sequence: kv.Sequence, tokens: Sequence[int], wanted: slice = slice(-1, None)) -> Tensor:
        """One forward pass over the next tokens of the sequence: logits [S, V] after the wanted ones of them."""
        spec, page_tokens = self.plan.spec, self.plan.page_tokens
        start = sequence.length
        kv.extend(self.pool, sequence, len(tokens), spec, page_tokens)
        chunks = (Chunk(0, len(tokens), 0, sequence.length),)
        batch = Batch(
            tokens_T=torch.tensor(tokens, device=self.device),
            positions_T=torch.arange(start, sequence.length, device=self.device),
            rows_T=torch.zeros(len(tokens), dtype=torch.int64, device=self.device),
            decodes=0,
            chunks=chunks,
            tiles_X4=torch.tensor(tiles(chunks), dtype=torch.int32, device=self.device),
            pages=kv.page_views(sequence, len(tokens), spec, page_tokens, self.device),
            wanted_S=torch.arange(len(tokens), device=self.device)[wanted],
        )
        logits_SV = forward(
            spec,
            self.weights,
            self.ops,
            self.comm,
            self.frequencies,
            self.kv_LPCSKD,
            batch,
            TORCH_DTYPE[self.plan.residual_dtype],
        )
        kv.drop_passed(self.pool, sequence, spec, page_tokens)
        return logits_SV

    @torch.inference_mode()
    def _draw(self, logits_SV: Tensor, request: Request, position: int) -> int:
        sampling = request.sampling

        def one(value: float | int, dtype: torch.dtype) -> Tensor:
            return torch.tensor([value], dtype=dtype, device=self.device)

        draws = Draws(
            temperature_S=one(sampling.temperature, torch.float32),
            top_p_S=one(sampling.top_p, torch.float32),
            min_p_S=one(sampling.min_p, torch.float32),
            presence_S=one(sampling.presence, torch.float32),
            frequency_S=one(sampling.frequency, torch.float32),
            top_k_S=one(sampling.top_k, torch.int32),
            seed_S=one(sampling.seed, torch.int64),
            position_S=one(position, torch.int64),
        )
        where = logits_SV, self.weights.first_token, self.comm.all_gather
        wanted = Wanted(candidates=sampling.top_p < 1 or sampling.top_k > 0, min_p=sampling.min_p > 0)
        drawn = self.ops.sample(*where, draws, wanted)
        if not bool(drawn.complete_S.all()):
            return int(self.ops.sample_exact(*where, draws).item())
        return int(drawn.tokens_S.item())
