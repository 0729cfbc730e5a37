"""doctor's comparison of kernels: right ones pass, and one that is wrong in a single place is named, and no other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gptoss_launch.parallel.kernels import PLAIN, Mixture, Operations
from gptoss_launch.parallel.kernels.cpu_products import cpu_operations
from gptoss_launch.parallel.kernels.sample import Drawn, Kept
from gptoss_launch.parallel.model import kernel_check
from gptoss_launch.parallel.model.kernel_check import agreements, check_gpu
from small_models import GPU
from torch import Tensor

CPU = torch.device("cpu")
NAMES = tuple(kernel_check._EXAMPLES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"HIDDEN": 96, "INNER": 64, "HEADS": 16, "KV_HEADS": 2, "HEAD_DIM": 16, "VOCAB": 2000}.items():
        monkeypatch.setattr(kernel_check, name, size)


def others() -> Operations:
    """Those of the plain ones, by other names."""

    def wrapped(name: str) -> Callable[..., Any]:
        return lambda *given: getattr(PLAIN, name)(*given)

    separate = dataclasses.replace(PLAIN, **{name: wrapped(name) for name in NAMES if name != "mixture"})
    return dataclasses.replace(separate, mixture=mixture(PLAIN.norm_experts))


def mixture(run: Callable[..., tuple[Tensor, Tensor]]) -> Mixture:
    return Mixture(PLAIN.norm_route, PLAIN.experts, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_ones_agree(small: None, dtype: torch.dtype) -> None:
    found = agreements(others(), CPU, dtype)
    assert [one.operation for one in found] == list(NAMES) and all(one.holds for one in found), found


def test_no_operation_is_left_out() -> None:
    """The layout is tried with the experts that read what it makes."""
    assert {field.name for field in dataclasses.fields(Operations)} == {"layout", *NAMES}


def test_references_are_not_compared_with_themselves() -> None:
    assert agreements(PLAIN, CPU, torch.float32) == []


def test_the_cpus_own_products(small: None) -> None:
    found = agreements(cpu_operations(), CPU, torch.float32)
    assert {one.operation: one.holds for one in found} == dict.fromkeys(("linear", "norm_qkv_write", "experts"), True)


def last_token_lost(result: Tensor) -> Tensor:
    result[-1] = 0
    return result


def second(results: tuple[Tensor, ...], change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    return results[0], change(results[1]), *results[2:]


def wrong_slots(*given: Any) -> tuple[Tensor, Tensor]:
    *rest, slots_T = given
    return PLAIN.norm_qkv_write(*rest, slots_T + (len(slots_T) > 1))


def no_window(*given: Any) -> Tensor:
    *rest, pages = given
    return PLAIN.attend(*rest, dataclasses.replace(pages, window_tokens=None))


def not_the_best(*given: Any) -> tuple[Tensor, ...]:
    *rest, chosen = given
    sum_TH, x_TH, weights_TX, experts_TX = PLAIN.norm_route(*rest, chosen + 1)
    return sum_TH, x_TH, weights_TX[:, 1:], experts_TX[:, 1:]


def one_slot_on(*given: Any) -> tuple[Tensor, ...]:
    *others, slots_KT = PLAIN.locate(*given)
    slots_KT[-1, -1] += 1
    return *others, slots_KT


def another_turn(*given: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    embedded_TH, (cos, sin) = PLAIN.embed(*given)
    return embedded_TH, (cos, -sin)


def one_number_nan(*given: Any) -> Tensor:
    result = PLAIN.linear(*given)
    result[0, 0] = float("nan")
    return result


def next_tokens(*given: Any) -> Drawn:
    drawn = PLAIN.sample(*given)
    return dataclasses.replace(drawn, tokens_S=drawn.tokens_S + (torch.arange(len(drawn.tokens_S)) % 8 == 3))


def kept_for_another_step(*given: Any) -> Drawn:
    *rest, kept = given
    if not isinstance(kept, Kept):
        return PLAIN.sample(*given)
    return PLAIN.sample(*rest, dataclasses.replace(kept, step_1=kept.step_1 + 1))


FAULTS: list[tuple[str, Any]] = [
    ("linear", one_number_nan),
    ("linear", lambda *given: PLAIN.linear(*given) * 1.05),
    ("add_norm", lambda *given: second(PLAIN.add_norm(*given), last_token_lost)),
    ("norm_qkv_write", wrong_slots),
    ("attend", no_window),
    ("norm_route", not_the_best),
    ("norm_route", lambda *given: second(PLAIN.norm_route(*given), last_token_lost)),
    ("upload", lambda words_W, to_W: PLAIN.upload(words_W[:-1], to_W[:-1])),
    ("locate", one_slot_on),
    ("embed", another_turn),
    ("experts", lambda *given: last_token_lost(PLAIN.experts(*given))),
    ("mixture", mixture(lambda *given: second(PLAIN.norm_experts(*given), lambda y_TH: y_TH * 1.05))),
    ("mixture", mixture(lambda *given: (given[0], PLAIN.norm_experts(*given)[1]))),
    ("sample", next_tokens),
    ("sample", kept_for_another_step),
    ("sample_exact", lambda *given: last_token_lost(PLAIN.sample_exact(*given))),
]


@pytest.mark.parametrize(("name", "wrong"), FAULTS)
def test_a_wrong_one_is_named(small: None, name: str, wrong: Any) -> None:
    found = agreements(dataclasses.replace(others(), **{name: wrong}), CPU, torch.bfloat16)
    assert [one.operation for one in found if not one.holds] == [name]


@pytest.mark.parametrize("index", [pytest.param(0, marks=GPU)])
def test_this_gpu(index: int) -> None:
    found = check_gpu(index)
    print(found)
    assert [one.operation for one in found] == list(NAMES) and all(one.holds for one in found)
