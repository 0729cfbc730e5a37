"""What is trained on: token ids with a loss weight each, and how they lie on disk.

Knows nothing of conversations or files of records: whoever starts a run makes the samples and writes them here once,
so that a resumed run, and every rank of it, reads the very same tokens.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence. weights[i] is what predicting tokens[i] from those before it counts in the loss; 0: not at all.

    tokens: array of "i" (int32). weights: array of "f" (fp32), as long; the first is 0, as nothing comes before it.
    source: which of the mixed sources it is from.
    """

    tokens: "array[int]"
    weights: "array[float]"
    source: int = 0

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.weights) > 0 and self.weights[0] == 0

    def __len__(self) -> int:
        return len(self.tokens)


def sample(tokens: Sequence[int], weights: Sequence[float], source: int = 0) -> Sample:
    return Sample(array("i", tokens), array("f", weights), source)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """All samples as four flat tensors in one safetensors file."""
    import torch
    from safetensors.torch import save_file

    tokens, weights = array("i"), array("f")
    for one in samples:
        tokens.extend(one.tokens)
        weights.extend(one.weights)
    save_file(
        {
            "tokens": torch.tensor(tokens, dtype=torch.int32),
            "weights": torch.tensor(weights, dtype=torch.float32),
            "lengths": torch.tensor([len(one) for one in samples], dtype=torch.int64),
            "sources": torch.tensor([one.source for one in samples], dtype=torch.int64),
        },
        path,
    )


def read_samples(path: Path) -> list[Sample]:
    from safetensors.torch import load_file

    tensors = load_file(path)
    lengths = tensors["lengths"].tolist()
    tokens, weights = tensors["tokens"].split(lengths), tensors["weights"].split(lengths)
    return [
        Sample(array("i", ids.numpy().tobytes()), array("f", counts.numpy().tobytes()), source)
        for ids, counts, source in zip(tokens, weights, tensors["sources"].tolist(), strict=True)
    ]
