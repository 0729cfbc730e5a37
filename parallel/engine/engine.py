"""One rank's engine: a step record in, the tokens that the step draws out.

Holds this rank's weights, its share of the KV pool and what the device keeps for every row. Purely token ids and rows;
it knows no text, and no other rank but through `comm`. Every rank of a replica launches the same records in the same
order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Operations
from ..kernels.adjust import adjust, count_tokens, mark_tokens
from ..kernels.batch import Batch, Chunk
from ..kernels.logprobs import logprobs
from ..kernels.rope import inverse_frequencies
from ..kernels.sample import Wanted
from ..model.comm import Comm
from ..model.dtypes import TORCH_DTYPE
from ..model.forward import hidden_states
from ..model.weights import Weights
from ..offload.counts import Counts
from ..offload.mapped import Mapped
from ..planning.pages import layers_per_page, local_kv_heads, pool_pages
from ..planning.plan import Plan
from . import inputs
from .constraint import flaw
from .graphs import Graphs
from .pages import Cache, Pool
from .record import ANSWER, PROMPT, RING_STEPS, Head, Padding, Record, Sizes, only_padding
from .request import MOST_BIASES, MOST_LOGPROBS, MOST_TOP_K, Request
from .schedule import Limits, Result, Scheduler


def sizes_of(plan: Plan) -> Sizes:
    """What records of this plan can hold. The page after the pool's last is the scratch page."""
    return Sizes(
        rows=plan.sequences,
        row_pages=-(-plan.context_tokens // plan.page_tokens),
        scratch_page=pool_pages(plan.spec, plan.kv_tokens, plan.sequences, plan.step_tokens, plan.page_tokens),
        step_tokens=plan.step_tokens,
        page_tokens=plan.page_tokens,
        vocab=plan.spec.vocab,
    )


def scheduler_for(plan: Plan) -> Scheduler:
    """The leader's, with the whole pool free."""
    sizes = sizes_of(plan)
    limits = Limits(sizes.rows, sizes.step_tokens, sizes.changes, sizes.most_biased)
    return Scheduler(Cache(Pool(sizes.scratch_page), plan.spec, plan.page_tokens), limits)


def refusal(plan: Plan, request: Request) -> str | None:
    """Why this request can never run under `plan`, with the numbers; None if it can."""
    prompt, limit, vocab = len(request.prompt_tokens), min(plan.context_tokens, plan.kv_tokens), plan.spec.vocab
    sampling = request.sampling
    if not prompt or request.max_tokens < 1:
        return f"{prompt} prompt tokens and max_tokens {request.max_tokens}: both must be at least 1"
    outside = next((token for token in request.prompt_tokens if not 0 <= token < vocab), None)
    outside = next((token for token, _ in sampling.logit_bias if not 0 <= token < vocab), outside)
    if outside is not None:
        return f"token id {outside} is outside the vocabulary of {vocab}"
    if prompt + request.max_tokens > limit:
        return f"{prompt} prompt tokens and max_tokens {request.max_tokens} exceed the context of {limit}"
    if not 0 <= sampling.top_k <= MOST_TOP_K:
        return f"top_k {sampling.top_k} is not between 0 and {MOST_TOP_K}"
    if len(sampling.logit_bias) > MOST_BIASES:
        return f"a logit_bias of {len(sampling.logit_bias)} tokens, and {MOST_BIASES} is the most"
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
        return f"logprobs {request.logprobs} is not between 0 and {MOST_LOGPROBS}"
    if request.constraint is not None:
        return flaw(request.constraint, request.stop_tokens, vocab)
    return None


@dataclass(frozen=True)
class Launched:
    """A step that runs, or has run. out_S2: drawn tokens and whether each is valid, on the host once `done`; logprobs:
    of the drawn, ids and logprobs of the most likely."""

    out_S2: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None
    done: torch.cuda.Event | None

    def results(self, count: int) -> list[Result]:
        """Of the first `count` draws; waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        pairs = self.out_S2[:count].tolist()
        if self.logprobs is None:
            return [Result(token, bool(complete)) for token, complete in pairs]
        rows = zip(pairs, *(part[:count].tolist() for part in self.logprobs), strict=True)
        return [
            Result(token, bool(complete), logprob, tuple(zip(ids, values, strict=True)))
            for (token, complete), logprob, ids, values in rows
        ]


class Engine:
    """`plan` is resolved; nothing is detected here. graphs: tokens of steps of decodes that run as CUDA graphs, and of
    steps that have chunks; none on the CPU, or where every operation has to be watched. experts: tells what `ops` have
    counted of experts that are elsewhere, nothing where all are on the device. files: that experts are read from
    meanwhile."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        weights: Weights,
        ops: Operations,
        comm: Comm,
        graphs: tuple[Sequence[int], Sequence[int]] = ((), ()),
        experts: Callable[[], Counts] = Counts,
        files: Mapped | None = None,
    ) -> None:
        spec = plan.spec
        self.experts, self._files = experts, files
        self.plan, self.weights, self.ops, self.comm = plan, weights, ops, comm
        self.device = weights.embed_VH.device
        self.sizes = sizes_of(plan)
        self.frequencies = inverse_frequencies(spec).to(self.device)
        # zeros, not empty: the bytes are really taken now, and a page never holds what another process left there
        self.kv_LPCSKD = torch.zeros(
            (
                layers_per_page(spec),
                self.sizes.scratch_page + 1,
                2,
                plan.page_tokens,
                local_kv_heads(spec, plan.mesh, rank),
                spec.head_dim,
            ),
            dtype=TORCH_DTYPE[plan.kv_dtype],
            device=self.device,
        )
        self.words = inputs.Words(self.sizes, self.device, ops.upload)
        self.rows = inputs.Rows.empty(self.sizes, len(weights.head_VH), self.device)
        assert max(graphs[1], default=0) <= plan.context_tokens, "padding is a sequence too"
        self.graphs = Graphs(*graphs, self.sizes.rows, self._captured)
        # what graphs of chunks end with: one for all, as each would keep its own
        room = max(graphs[1], default=0), spec.hidden
        self._hidden_TH = torch.empty(room, dtype=TORCH_DTYPE[plan.dtype], device=self.device)
        # Draws of the last steps, each until the host has read it, before which it launches one step more. Triton's
        # kernels write them to pinned memory of the host themselves; torch's cannot, and `_deliver` copies theirs.
        on_host = self.device.type == "cuda" and plan.kernels == "triton"
        self._outs_NS2 = torch.zeros(
            (RING_STEPS, plan.sequences, 2),
            dtype=torch.int64,
            device="cpu" if on_host else self.device,
            pin_memory=on_host,
        )

    @torch.inference_mode()
    def launch(self, record: Record) -> Launched:
        """Start the step; on the CPU it is over on return. Raises UserError for a file that the weights are read from
        and that has been cut: before the step, or while it was read, which is over on return on any device."""
        if self._files is None:
            return self._launch(record)
        self._files.check()
        launched = self._launch(record)
        self._files.check()
        return launched

    @torch.inference_mode()
    def rehearse(self, record: Record) -> None:
        """Launches the kernels of a step of the scratch row where Triton's do not run (`triton_launch`), before any
        step, whatever they leave behind.

        Nothing that torch looks up by comes from such a kernel. The record is not uploaded: rows, places and the
        numbers of draws are zeros, so that all rows are drawn greedily, and no draw is incomplete. Candidates are
        looked up as torch has sorted them.
        """
        head = record.head
        self.words.upload(record)
        self.words.device_W.zero_()  # as they are before the first upload
        if head.graph:
            self.graphs.rehearse(head)
        else:
            self._draw(head, self.forward(self._batch(head, record.chunks)).zero_())

    def _launch(self, record: Record) -> Launched:
        """All on one stream, in this order: the record's words are read from the host, rows are begun, the step runs,
        its draws are written to the host, and an event says that they are there. Triton's operations do all of it by
        kernels. A copy would go through an engine of its own, for which the stream waits on either side."""
        head = record.head
        in_graph = bool(head.graph and (head.tiles or not head.exact))
        if in_graph:
            self._capture(head)
        self.words.upload(record)
        inputs.begin_rows(head, self.words.device_W, self.rows)
        if head.counts:
            self._count(head)
        if in_graph:
            ends, tokens_S = self.graphs.replay(head)
            logits_SV = self._head(ends[inputs.wanted(head, self.words.device_W)]) if head.tiles else ends
        else:
            logits_SV, tokens_S = self.forward(self._batch(head, record.chunks)), None
        if not head.draws:  # the middle of a prompt: waited for too, so that no host runs ahead of its buffers
            return Launched(torch.empty((0, 2), dtype=torch.int64), None, self._done())
        if tokens_S is None:
            tokens_S = self._draw(head, logits_SV)
        likely = None
        if head.most_logprobs >= 0:
            first_token, gather = self.weights.first_token, self.comm.all_gather
            likely = logprobs(logits_SV, first_token, gather, tokens_S, head.most_logprobs)
        return self._deliver(head, likely)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [S, V] of the wanted tokens over the vocabulary rows held here."""
        return self._head(self._hidden(batch))

    def _hidden(self, batch: Batch) -> Tensor:
        """[S, H], of the wanted tokens."""
        return hidden_states(
            self.plan.spec,
            self.weights,
            self.weights.layers,
            self.ops,
            self.comm,
            self.frequencies,
            self.kv_LPCSKD,
            batch,
            TORCH_DTYPE[self.plan.residual_dtype],
        )

    def _head(self, x_SH: Tensor) -> Tensor:
        return self.ops.linear(x_SH, self.weights.head_VH)

    def _batch(self, head: Head, chunks: tuple[Chunk, ...] = ()) -> Batch:
        spec, page_tokens = self.plan.spec, self.plan.page_tokens
        return inputs.batch(head, chunks, self.words.device_W, self.rows, spec, page_tokens, self.ops.locate)

    def _count(self, head: Head) -> None:
        """Also where nothing is drawn: the middle of a prompt, or of an answer that begins again."""
        rows_T, tokens_T, counted_T = inputs.fed(head, self.words.device_W, self.rows)
        counts_RV, first_token = self.rows.counts_RV, self.weights.first_token
        mark_tokens(counts_RV, first_token, rows_T, tokens_T, counted_T == PROMPT)
        count_tokens(counts_RV, first_token, rows_T, tokens_T, counted_T == ANSWER)

    def _draw(self, head: Head, logits_SV: Tensor) -> Tensor:
        """Draw, keep each row's token for its next step, and tell the host."""
        words_W, first_token, gather = self.words.device_W, self.weights.first_token, self.comm.all_gather
        draws, kept = inputs.draws(head, words_W), inputs.kept(head, words_W, self.rows, self._outs_NS2)
        if head.adjusts:
            bias, allowed_SW = inputs.biases(head, words_W, self.rows), inputs.allowed(head, words_W)
            counts_RV, row_S, repeats = self.rows.counts_RV, kept.row_S.long(), bool(head.repeats)
            logits_SV = adjust(logits_SV, first_token, draws, counts_RV, row_S, bias, allowed_SW, repeats)
        if head.exact:
            return self.ops.sample_exact(logits_SV, first_token, gather, draws, kept)
        wanted = Wanted(bool(head.candidates), bool(head.min_p))
        return self.ops.sample(logits_SV, first_token, gather, draws, wanted, kept).tokens_S

    def _capture(self, head: Head) -> None:
        """Capture the graph that `head` needs if there is none yet, on a step of the scratch row: the step is run once
        before, so that kernels are compiled, and what it leaves behind must not matter."""
        if not self.graphs.has(head):
            self.words.upload(only_padding(head.number, self.sizes, Padding(head.graph, head.tiles)))
            self.graphs.capture(head)

    def _captured(self, head: Head, draw: bool) -> tuple[Tensor, Tensor | None]:
        """What a graph holds: logits and, if wanted, draws; of a step with chunks the hidden states of all tokens."""
        batch = self._batch(head)
        if head.tiles:
            return self._hidden_TH[: head.graph].copy_(self._hidden(batch)), None
        logits_SV = self.forward(batch)
        return logits_SV, self._draw(head, logits_SV) if draw else None

    def _deliver(self, head: Head, likely: tuple[Tensor, Tensor, Tensor] | None) -> Launched:
        """What the host may read once the event has come. The next step is launched before, and keeps its draws in
        another place."""
        host_S2 = self._outs_NS2[head.number % RING_STEPS, : head.draws].to("cpu", non_blocking=True)
        if likely is not None:
            mine, ids, tops = (part.to("cpu", non_blocking=True) for part in likely)
            likely = (mine, ids, tops)
        return Launched(host_S2, likely, self._done())

    def _done(self) -> "torch.cuda.Event | None":
        """Comes when the device has come so far; None for the CPU, which has."""
        if self.device.type == "cpu":
            return None
        done = torch.cuda.Event()
        done.record()
        return done
