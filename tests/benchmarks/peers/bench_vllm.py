"""Decode and prefill of vLLM on the same checkpoint: `python bench_vllm.py CHECKPOINT [--ranks N] [--batch 1,8,32]`.

Its own offline call, with CUDA graphs and everything else as it chooses, but for four settings: no prefix cache, as no
prompt comes twice; no tokenizer, as prompts are ids; 8,192 tokens a step, as its server takes on large GPUs; nothing
that needs NVLink multicast, which not every machine has. The last costs it its fused all-reduce with two GPUs and more,
and the rows say so.
"""

import argparse
import os
import time
from collections.abc import Sequence

from gptoss_launch.launch.bench.rows import About
from peer_rows import arguments, rows, tell

# Read by vLLM when it is imported. It asks no server for anything, and its own all-reduce needs no multicast.
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}


def main() -> None:
    parser = arguments(__doc__ or "", "1,8,32")
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel")
    parser.add_argument("--ep", action="store_true", help="place whole experts on ranks")
    parser.add_argument("--gpu-share", type=float, default=0.85, help="of the memory that it may take")
    given = parser.parse_args()
    os.environ.update(SETTINGS)
    began_s = time.perf_counter()
    llm, version = load(given)
    start_s = time.perf_counter() - began_s
    notes = ("its fused all-reduce is off: it needs NVLink multicast",) if given.ranks > 1 else ()
    tell(given, rows(given, about(given, version, start_s), lambda prompts, new: generate(llm, prompts, new), notes))


def load(given: argparse.Namespace):
    import vllm

    longest = given.prompt + given.new + 16
    llm = vllm.LLM(
        model=str(given.checkpoint),
        tensor_parallel_size=given.ranks,
        enable_expert_parallel=given.ep,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=max(8192, longest),
        max_num_batched_tokens=8192,
        max_num_seqs=max(256, *map(int, given.batch.split(","))),
        gpu_memory_utilization=given.gpu_share,
        disable_log_stats=True,
        compilation_config={"pass_config": {"fuse_allreduce_rms": False}},
    )
    return llm, vllm.__version__


def about(given: argparse.Namespace, version: str, start_s: float) -> About:
    import torch

    return About(
        engine="vllm",
        version=version,
        model=given.checkpoint.name,
        route="LLM.generate, token ids, ignore_eos",
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        ranks=given.ranks,
        ep=given.ranks if given.ep else 1,
        packages={"torch": torch.__version__},
        start_s=start_s,
    )


def generate(llm, prompts: Sequence[tuple[int, ...]], new: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
    began_s = time.perf_counter()
    answers = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], sampling, use_tqdm=False)
    spent_s = time.perf_counter() - began_s
    counts = {len(answer.outputs[0].token_ids) for answer in answers}
    assert counts == {new} and len(answers) == len(prompts), f"answers of {counts} tokens, not {new}"
    return spent_s


if __name__ == "__main__":
    main()
