"""Which samples an epoch takes, in which order, and how they share packs of a fixed number of tokens.

All of it is a pure function of (lengths, sources, seed, epoch): a run that resumes at pack number n needs no more than
n to go on exactly as it would have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

OPEN_PACKS = 64  # packs that wait for a sample that still fits; more of them waste fewer tokens and mix less


@dataclass(frozen=True)
class Mixture:
    """lengths, sources: of each sample, in tokens and by number. weights: how often an epoch takes each sample of a
    source: 1 once, 2 twice, 0.5 every second one, the others in the next epoch."""

    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    weights: tuple[float, ...]


def epoch_order(mixture: Mixture, seed: int, epoch: int) -> list[int]:
    """Sample numbers of one epoch, shuffled. Over epochs every sample of a source is taken equally often."""
    taken: list[int] = []
    for source, weight in enumerate(mixture.weights):
        members = [index for index, its_source in enumerate(mixture.sources) if its_source == source]
        # the epochs cut a stream of shuffles of the source into pieces that differ by one sample at most
        place, stop = (round(number * weight * len(members)) for number in (epoch, epoch + 1))
        while place < stop:
            block, offset = divmod(place, len(members))
            shuffled = members.copy()
            Random(f"{seed}/source {source}/{block}").shuffle(shuffled)
            piece = shuffled[offset : offset + stop - place]
            taken += piece
            place += len(piece)
    Random(f"{seed}/epoch {epoch}").shuffle(taken)
    return taken


def pack(order: Sequence[int], lengths: Sequence[int], capacity_tokens: int) -> list[list[int]]:
    """Sample numbers in packs of at most `capacity_tokens`: each goes into the fullest open pack that it fits."""
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (tokens left, pack), the oldest first
    for index in order:
        length = lengths[index]
        assert length <= capacity_tokens, f"sample {index} has {length} tokens of {capacity_tokens}"
        fitting = [(left, place) for place, (left, _) in enumerate(open_packs) if left >= length]
        if fitting:
            left, place = min(fitting)
            number = open_packs[place][1]
            packs[number].append(index)
            open_packs[place] = (left - length, number)
        else:
            if len(open_packs) == OPEN_PACKS:
                open_packs.remove(min(open_packs))  # the fullest
            packs.append([index])
            open_packs.append((capacity_tokens - length, len(packs) - 1))
    return packs


def steps(
    mixture: Mixture, seed: int, capacity_tokens: int, packs_per_step: int, first_step: int = 0
) -> Iterator[tuple[int, list[list[int]]]]:
    """(epoch, the packs of one optimizer step), without end, from step `first_step` on.

    An epoch's last step may have fewer packs: epochs do not mix.
    """
    step, epoch = 0, 0
    while True:
        packs = pack(epoch_order(mixture, seed, epoch), mixture.lengths, capacity_tokens)
        for start in range(0, len(packs), packs_per_step):
            if step >= first_step:
                yield epoch, packs[start : start + packs_per_step]
            step += 1
        epoch += 1


def steps_per_epoch(mixture: Mixture, seed: int, capacity_tokens: int, packs_per_step: int, epoch: int) -> int:
    packs = pack(epoch_order(mixture, seed, epoch), mixture.lengths, capacity_tokens)
    return -(-len(packs) // packs_per_step)
