"""Decode and prefill of transformers on the same checkpoint: `python bench_transformers.py CHECKPOINT [--batch 1,32]`.

`generate` in bf16 with dequantized experts, eager, as it comes. On several GPUs start it under torchrun: tp_plan="auto"
then spreads it over them. Rank 0 prints.
"""

import argparse
import os
import time
from collections.abc import Sequence

import torch
import transformers
from gptoss_launch.launch.bench.rows import About
from peer_rows import arguments, rows, tell
from transformers import AutoModelForCausalLM, Mxfp4Config


def main() -> None:
    given = arguments(__doc__ or "", "1,32").parse_args()
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    began_s = time.perf_counter()
    model = load(given, ranks, device)
    start_s = time.perf_counter() - began_s
    found = rows(
        given,
        about(given, ranks, device, start_s),
        lambda prompts, new: generate(model, prompts, new, device),
    )
    if rank == 0:
        tell(given, found)
    else:
        list(found)  # the same calls in the same order on every rank


def load(given: argparse.Namespace, ranks: int, device: torch.device) -> torch.nn.Module:
    where = {"tp_plan": "auto"} if ranks > 1 else {"device_map": str(device)}
    quantization = Mxfp4Config(dequantize=True)
    folder = str(given.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, **where
    )
    return model.eval()


def about(given: argparse.Namespace, ranks: int, device: torch.device, start_s: float) -> About:
    return About(
        engine="transformers",
        version=transformers.__version__,
        model=given.checkpoint.name,
        route="generate, token ids, min_new_tokens",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        ranks=ranks,
        ep=1,
        packages={"torch": torch.__version__},
        start_s=start_s,
    )


@torch.inference_mode()
def generate(model: torch.nn.Module, prompts: Sequence[tuple[int, ...]], new: int, device: torch.device) -> float:
    ids = torch.tensor(prompts, device=device)
    began_s = time.perf_counter()
    answers = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    answers = answers.cpu()  # every token on the host
    spent_s = time.perf_counter() - began_s
    assert answers.shape == (len(prompts), ids.shape[1] + new), tuple(answers.shape)
    return spent_s


if __name__ == "__main__":
    main()
