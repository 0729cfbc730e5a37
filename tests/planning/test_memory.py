"""Predicted bytes against sums that are known from elsewhere or counted by hand."""

import pytest
from gptoss_launch.parallel.planning.memory import (
    DECODE_GRAPHS_BYTES,
    FLAGGED_BYTES,
    INSIDE_BYTES,
    PROCESS,
    Room,
    communication_bytes,
    prompt_bytes,
    rank_memory,
    weights_bytes,
)
from gptoss_launch.parallel.planning.shards import Mesh, table
from gptoss_launch.parallel.planning.spec import PUBLISHED

SINGLE = Mesh()

SPEC = PUBLISHED["openai/gpt-oss-20b"]
WIDE_ELEMENTS = 24 * (2 * 2880 + 64) + 2880  # norms and sinks, fp32 in memory, bf16 in the checkpoint


def test_weights_in_bf16_are_the_checkpoint_but_for_norms_and_sinks() -> None:
    assert weights_bytes(SPEC, SINGLE, 0, "bf16") == 13_761_264_768 + 2 * WIDE_ELEMENTS


def test_fp32_doubles_all_but_the_packed_experts() -> None:
    packed = sum(row.nbytes for row in table(SPEC) if row.dtype == "U8")
    assert weights_bytes(SPEC, SINGLE, 0, "fp32") == packed + 2 * (13_761_264_768 - packed)


@pytest.mark.parametrize(("ranks", "ep"), [(2, 1), (2, 2), (3, 3), (8, 4)])
def test_ranks_hold_the_whole_model_and_copies_of_the_small_rows(ranks: int, ep: int) -> None:
    mesh = Mesh(ranks, ep)
    total = sum(weights_bytes(SPEC, mesh, rank, "bf16") for rank in range(ranks))
    whole = weights_bytes(SPEC, SINGLE, 0, "bf16")
    assert whole <= total < whole * 1.01  # norms, router and biases are on every rank


@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_workspace_grows_with_what_it_is_for_and_shrinks_with_ranks(kernels) -> None:
    """With graphs, in which prompts live."""

    def workspace(mesh: Mesh, context_tokens: int, step_tokens: int, sequences: int = 8) -> int:
        room = Room(context_tokens, sequences, context_tokens, 16, step_tokens)
        row = rank_memory(SPEC, mesh, 0, "cuda", "bf16", "bf16", "bf16", kernels, room)
        return row.workspace_bytes + row.graphs_bytes

    base = workspace(SINGLE, 8192, 1024)
    assert base < workspace(SINGLE, 131072, 1024)
    assert base < workspace(SINGLE, 8192, 2048)
    assert base < workspace(SINGLE, 8192, 1024, sequences=256)
    assert workspace(Mesh(8), 8192, 1024) < base


def test_prompts_live_in_graphs_or_in_the_workspace() -> None:
    given = SPEC, SINGLE, 0, "cuda", "bf16", "bf16", "bf16", "triton", Room(8192, 1, 8192, 64, 2048)
    prompts = prompt_bytes(SPEC, SINGLE, 0, "bf16", "bf16", "triton", given[-1])
    graphs, launched = rank_memory(*given), rank_memory(*given, prompt_graphs=False)
    assert launched.graphs_bytes == DECODE_GRAPHS_BYTES
    assert graphs.graphs_bytes > DECODE_GRAPHS_BYTES + prompts
    assert graphs.workspace_bytes + prompts / 2 < launched.workspace_bytes < graphs.workspace_bytes + prompts


def test_communication_is_for_several_ranks_on_gpus() -> None:
    assert communication_bytes(SPEC, SINGLE, "cuda", "bf16", 2048) == 0
    assert communication_bytes(SPEC, Mesh(2), "cpu", "fp32", 512) == 0
    buffer_bytes = 2048 * 2880 * 2 + FLAGGED_BYTES + INSIDE_BYTES
    assert communication_bytes(SPEC, Mesh(2), "cuda", "bf16", 2048) == PROCESS["cuda"].nccl_bytes + buffer_bytes
