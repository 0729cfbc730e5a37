"""Order, mixing and packing of samples, and how they lie on disk."""

import itertools
from collections import Counter
from pathlib import Path
from random import Random

import torch
from gptoss_launch.parallel.training.batch import make_pack
from gptoss_launch.parallel.training.order import Mixture, epoch_order, pack, steps, steps_per_epoch
from gptoss_launch.parallel.training.samples import read_samples, sample, write_samples


def mixture(weights: tuple[float, ...], counts: tuple[int, ...]) -> Mixture:
    rng = Random(0)
    sources = tuple(source for source, count in enumerate(counts) for _ in range(count))
    return Mixture(tuple(rng.randint(1, 100) for _ in sources), sources, weights)


def test_weights_say_how_often_an_epoch_takes_a_sample() -> None:
    mixed = mixture((1.0, 2.0, 0.5), (10, 4, 6))
    for epoch in range(3):
        times = Counter(epoch_order(mixed, seed=1, epoch=epoch))
        assert [times[index] for index in range(10)] == [1] * 10
        assert [times[index] for index in range(10, 14)] == [2] * 4
        assert sum(times[index] for index in range(14, 20)) == 3
    # a source that an epoch takes half of is through after two
    twice = Counter(epoch_order(mixed, 1, 0) + epoch_order(mixed, 1, 1))
    assert {twice[index] for index in range(14, 20)} == {1}


def test_a_source_that_an_epoch_takes_less_than_a_sample_of_is_taken_all_the_same() -> None:
    mixed = mixture((1.0, 0.03), (2, 10))
    times = Counter(index for epoch in range(100) for index in epoch_order(mixed, 1, epoch))
    assert [times[index] for index in range(2)] == [100] * 2
    assert [times[index] for index in range(2, 12)] == [3] * 10
    alone = mixture((0.03,), (10,))
    assert len(list(itertools.islice(steps(alone, 1, 200, 1), 3))) == 3  # and not for ever


def test_order_depends_on_seed_and_epoch_alone() -> None:
    mixed = mixture((1.0,), (50,))
    orders = [epoch_order(mixed, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert orders[0] == epoch_order(mixed, 1, 0)


def test_packs_hold_every_sample_once_and_no_more_than_fits() -> None:
    mixed = mixture((1.0,), (500,))
    order = epoch_order(mixed, 3, 0)
    packs = pack(order, mixed.lengths, 256)
    assert sorted(itertools.chain(*packs)) == sorted(order)
    sizes = [sum(mixed.lengths[index] for index in members) for members in packs]
    assert max(sizes) <= 256
    assert sum(sizes) / (256 * len(sizes)) > 0.95


def test_steps_can_begin_anywhere() -> None:
    mixed = mixture((1.0,), (40,))
    a_epoch = steps_per_epoch(mixed, 0, 200, 3, epoch=0)
    whole = list(itertools.islice(steps(mixed, 0, 200, 3), 3 * a_epoch))
    assert [epoch for epoch, _ in whole[: a_epoch + 1]] == [0] * a_epoch + [1]
    for first in (1, a_epoch, a_epoch + 2):
        assert list(itertools.islice(steps(mixed, 0, 200, 3, first), 4)) == whole[first : first + 4]


def test_samples_come_back_from_disk(tmp_path: Path) -> None:
    samples = [sample([1, 2, 201087], [0, 0.5, 1]), sample([7], [0], source=3)]
    write_samples(tmp_path / "train.safetensors", samples)
    back = read_samples(tmp_path / "train.safetensors")
    assert [(s.tokens, s.weights, s.source) for s in back] == [(s.tokens, s.weights, s.source) for s in samples]


def test_a_pack_keeps_documents_apart() -> None:
    packed = make_pack([sample([5, 6, 7], [0, 1, 2]), sample([8, 9], [0, 3])], torch.device("cpu"))
    assert packed.bounds == (0, 3, 5)
    assert packed.tokens_T.tolist() == [5, 6, 7, 8, 9]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1]
    # nothing is learnt from one document about the next
    assert packed.learnt_R.tolist() == [0, 1, 3] and packed.targets_R.tolist() == [6, 7, 9]
    assert packed.weights_R.tolist() == [1, 2, 3]
    assert packed.weight == 6
