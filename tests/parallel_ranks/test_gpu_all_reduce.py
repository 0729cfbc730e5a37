"""Linked GPUs add messages up, by every way, as the process group does, and all of them hold the same bits.

Under torchrun, `test_gpu_all_reduce.py` is a rank's part.
"""

import itertools
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from gptoss_launch.parallel.model.comm import WAYS, Group, Linked, check_equal
from torch import Tensor
from torchrun import torchrun

HIDDEN = 2880
COUNTS = (1, 2, 63, 127, 128, 129, HIDDEN, 5 * HIDDEN, 40 * HIDDEN + 7, 64 * HIDDEN, 131072, 2048 * HIDDEN)
BUFFER_BYTES = 2048 * HIDDEN * 2
REPLAYS, GRAPH_COUNTS = 1000, (HIDDEN, 7, 20 * HIDDEN + 1, HIDDEN, 45 * HIDDEN)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_all_reduces() -> None:
    print(torchrun(2, __file__, timeout_s=250))


def message(rank: int, call: int | Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank adds in a call: no two are alike, and their sums have to be rounded. call: a number or, within a
    graph, a tensor on the device."""
    at = torch.arange(count, device="cuda")
    return (((at * 37 + rank * 101 + call * 59) % 509 - 254).float() / (3 + rank)).to(dtype)


def in_rank_order(call: int | Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The sum in fp32, rounded once."""
    total = message(0, call, count, dtype).float()
    for rank in range(1, dist.get_world_size()):
        total = total + message(rank, call, count, dtype).float()
    return total.to(dtype)


def check_sums(linked: Linked) -> int:
    """Every way, dtype and size, in mixed order: the group's sum, to a rounding of each of its additions, and on all
    ranks the same. The flagged way besides: the sum in rank order, rounded once, bit by bit. Returns how many sums."""
    checked = 0
    for call, (count, dtype, way) in enumerate(
        itertools.product(COUNTS, (torch.bfloat16, torch.float16, torch.float32), WAYS)
    ):
        x = message(dist.get_rank(), call, count, dtype)
        whole = x.nbytes % 4 == 0 or way in ("group", "flagged")  # torch's kernels take no broken word
        if not (whole and linked.takes(way, x)):
            continue
        expected = Group().all_reduce(x.clone())
        got = linked.all_reduce_by(way, x)
        where = f"{way}, {count} of {dtype}"
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2, msg=where)
        check_equal(linked, got, where)
        if way == "flagged":
            assert torch.equal(got, in_rank_order(call, count, dtype)), where
        checked += 1
    return checked


def check_replays(linked: Linked) -> None:
    """A graph of several flagged sums, replayed with messages that change, while one rank or another is late: before a
    replay, or between the kernels of one. Whole rows come from a kernel, and go to one, that starts early itself."""
    from gptoss_launch.parallel.kernels.triton_norm import add_norm

    rank, dtype = dist.get_rank(), torch.bfloat16
    call, wrong = torch.zeros((), dtype=torch.int64, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    weight = torch.ones(HIDDEN, device="cuda")

    def passed_on(x: Tensor) -> Tensor:
        rows = x.view(-1, HIDDEN)
        return add_norm(torch.zeros_like(rows), rows, weight, 1e-5, dtype)[0]

    def sums() -> None:
        for count in GRAPH_COUNTS:
            call.add_(1)
            x = message(rank, call, count, dtype)
            if count % HIDDEN:
                got = linked.all_reduce_by("flagged", x)
            else:
                got = passed_on(linked.all_reduce_by("flagged", passed_on(x))).flatten()
            wrong.add_((got != in_rank_order(call, count, dtype)).sum())
            if rank == 1:
                torch.cuda._sleep(20_000)

    sums()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        sums()
    for replay in range(REPLAYS):
        if replay % 7 == 3 * rank:
            torch.cuda._sleep(200_000)
        graph.replay()
        if replay % 100 == 0:  # not only replayed ones
            sums()
    torch.cuda.synchronize()
    assert call.item() == len(GRAPH_COUNTS) * (1 + REPLAYS + -(-REPLAYS // 100))
    assert wrong.item() == 0, f"{wrong.item()} elements are wrong"


def check_products(linked: Linked) -> None:
    """Sums inside the products of one token, as `check_replays` has others: bit by bit those of the product and a
    flagged sum after it, in published sizes."""
    from gptoss_launch.parallel.kernels import triton_decode, triton_linear
    from gptoss_launch.parallel.kernels.triton_experts import experts
    from gptoss_launch.parallel.kernels.triton_mxfp4 import Tiles, pack

    rank, ranks, dtype = dist.get_rank(), dist.get_world_size(), torch.bfloat16
    linked.limits = ((HIDDEN * 2, "flagged"),)
    generator = torch.Generator("cuda").manual_seed(rank)
    call, wrong = torch.zeros((), dtype=torch.int64, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    columns = HIDDEN // ranks // 32 * 32

    def packed(rows: int, inputs: int) -> Tiles:
        size = (8, rows, inputs // 32)
        blocks = torch.randint(0, 256, (*size, 16), generator=generator, device="cuda", dtype=torch.uint8)
        scales = torch.randint(117, 123, size, generator=generator, device="cuda", dtype=torch.uint8)
        return pack(blocks, scales, torch.randn(size[:2], generator=generator, device="cuda").to(dtype))

    gate_up, down = packed(2 * columns, HIDDEN), packed(HIDDEN, columns)
    out_HQ = torch.randn((HIDDEN, 4096 // ranks), generator=generator, device="cuda").to(dtype)
    bias_H, weights_TX = gate_up.bias[0, :1].expand(HIDDEN).contiguous(), torch.full((1, 4), 0.25, device="cuda")
    for one in (
        triton_linear.one_message(out_HQ[:1], out_HQ, triton_linear.ONE_SUMMED[0]),
        triton_decode.one_message(out_HQ[:1], down),
    ):
        with linked.exchange(one) as exchange:
            assert exchange is not None, f"{one} is not exchanged here"

    def sums() -> None:
        for _ in range(3):
            call.add_(1)
            x_TH = (message(0, call, HIDDEN, dtype) / 80).view(1, HIDDEN)
            chosen_TX = ((call + torch.arange(4, device="cuda")) % 8)[None]
            given = x_TH, weights_TX, chosen_TX, gate_up, down, 0, 7.0
            of_out = x_TH[:, : out_HQ.shape[1]], out_HQ, bias_H
            product: Callable[..., Tensor]
            for product, inputs in ((triton_linear.linear, of_out), (experts, given)):
                after = linked.all_reduce_by("flagged", product(*inputs))
                wrong.add_((product(*inputs, linked) != after).sum())
                if rank == 1:
                    torch.cuda._sleep(20_000)

    sums()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        sums()
    for replay in range(REPLAYS):
        if replay % 7 == 3 * rank:
            torch.cuda._sleep(200_000)
        graph.replay()
        if replay % 100 == 0:  # not only replayed ones
            sums()
    torch.cuda.synchronize()
    assert call.item() == 3 * (1 + REPLAYS + -(-REPLAYS // 100))
    assert wrong.item() == 0, f"{wrong.item()} elements are wrong"


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    linked = Linked(BUFFER_BYTES, limits=())
    assert linked.takes("flagged", torch.empty(1, device="cuda")), "these GPUs cannot have the flagged way"
    print(f"rank {dist.get_rank()}: {check_sums(linked)} sums", flush=True)
    for check in (check_replays, check_products):
        check(linked)
        print(f"rank {dist.get_rank()}: {REPLAYS} replays of {check.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
