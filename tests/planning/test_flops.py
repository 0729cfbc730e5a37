"""Operations of training, against the figures that others count with."""

import pytest
from gptoss_launch.parallel.planning.flops import FORWARDS, PEAK_BF16, forward_flops, peak_flops, training_flops
from gptoss_launch.parallel.planning.machine import machine_names, read_machine
from gptoss_launch.parallel.planning.spec import PUBLISHED


@pytest.mark.parametrize(
    ("model", "mode", "giga"),
    [("20b", "full", 22.9), ("20b", "lora", 15.3), ("120b", "full", 32.7), ("120b", "lora", 21.8)],
)
def test_operations_a_token_of_a_context_of_4096(model: str, mode: str, giga: float) -> None:
    spec = PUBLISHED[f"openai/gpt-oss-{model}"]
    assert training_flops(spec, [4096], mode) / 4096 / 1e9 == pytest.approx(giga, abs=0.06)


def test_a_token_sees_its_own_document_and_its_window() -> None:
    spec = PUBLISHED["openai/gpt-oss-20b"]
    first, second = (forward_flops(spec, [length]) for length in (300, 301))
    one_more = second - first - forward_flops(spec, [1])
    # the last token of 301 sees 301 in a full layer and 128 in a window; that of 1 sees itself
    assert one_more == 4 * 4096 * (12 * (301 - 1) + 12 * (128 - 1))
    assert forward_flops(spec, [300, 301]) == first + second


def test_peaks_are_of_names_that_machines_have() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H200", "fp32") is None and peak_flops("Voodoo", "bf16") is None
    names = {gpu.name.removeprefix("NVIDIA ") for name in machine_names() for gpu in read_machine(name).gpus}
    assert len(names & PEAK_BF16.keys()) >= 5 and set(FORWARDS) == {"lora", "full"}
