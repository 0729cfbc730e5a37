"""A sample as text in which one sees what counts in the loss. Knows nothing of where it is printed."""

from rich.text import Text

from ..parallel.training.samples import Sample
from .tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"  # round what is trained, so that the mask survives without colours


def preview(sample: Sample, tokenizer: Tokenizer) -> Text:
    """Context dim, what is trained in green between brackets, with its weight where that is not 1; markup bold."""
    text = Text()
    markup = set(tokenizer.special.values())
    weight = 0.0
    data = b""

    def flush(style: str) -> None:
        nonlocal data
        text.append(data.decode("utf-8", "replace"), style)
        data = b""

    def colour() -> str:
        return "green" if weight else "dim"

    for token, its_weight in zip(sample.tokens, sample.weights, strict=True):
        if its_weight != weight:
            flush(colour())
            if weight:
                text.append(CLOSE, "bold cyan")
            weight = its_weight
            if weight:
                text.append(OPEN if weight == 1 else f"{OPEN}{weight:g}×", "bold cyan")
        if token in markup:
            flush(colour())
            text.append(tokenizer.token_bytes(token).decode(), f"bold {colour()}")
        else:
            data += tokenizer.token_bytes(token)
    flush(colour())
    if weight:
        text.append(CLOSE, "bold cyan")
    return text


def summary(sample: Sample) -> str:
    trained = sum(weight > 0 for weight in sample.weights)
    return f"{len(sample)} tokens, {trained} trained, weight {sum(sample.weights):g}"
