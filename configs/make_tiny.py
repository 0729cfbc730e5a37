"""Make what configs/tiny, the embedded checkpoint, began its training with: `python -m gptoss_launch.configs.make_tiny
FOLDER`, bit for bit; finetune/tiny-full.yaml goes on from there.

A real checkpoint in the published layout, small enough to ship: MXFP4 experts, 8 KV heads, 9 MXFP4 blocks a row of an
expert's width, sinks, window, YaRN, and a byte-level BPE tokenizer with every harmony token. The
tokenizer is trained here in plain Python, so that no library's version can change it.
"""

import json
import re
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

from ..parallel.planning.spec import Spec, alternating_kinds

SEED = 20
VOCAB = 1024
SPEC = Spec(
    layers=4,
    hidden=256,
    intermediate=288,
    experts=8,
    experts_per_token=4,
    heads=16,
    kv_heads=8,
    head_dim=16,
    vocab=VOCAB,
    window_tokens=128,
    layer_kinds=alternating_kinds(4),
    max_context_tokens=131072,
    rope_theta=150000.0,
    yarn_factor=32.0,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    yarn_original_tokens=4096,
    norm_eps=1e-5,
    swiglu_limit=7.0,
)
# In the order of the published tokenizer, ids 199998 to 200018 there
SPECIAL = (
    "<|startoftext|> <|endoftext|> <|reserved_200000|> <|reserved_200001|> <|return|> <|constrain|> "
    "<|reserved_200004|> <|channel|> <|start|> <|end|> <|message|> <|reserved_200009|> <|reserved_200010|> "
    "<|reserved_200011|> <|call|> <|reserved_200013|> <|reserved_200014|> <|reserved_200015|> "
    "<|reserved_200016|> <|reserved_200017|> <|endofprompt|>"
).split()
# GPT-2's split into words (https://github.com/openai/gpt-2, encoder.py), for a corpus of ASCII letters
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    code = {byte: byte for byte in printable} | {byte: 256 + index for index, byte in enumerate(others)}
    return [chr(code[byte]) for byte in range(256)]


def train_merges(text: str, count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (https://arxiv.org/abs/1508.07909): the most frequent pair first, ties by spelling."""
    characters = byte_characters()
    words = Counter(tuple(characters[byte] for byte in word.encode()) for word in WORDS.findall(text))
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += times
        if not pairs:
            raise SystemExit(f"the corpus gives {len(merges)} merges, {count} wanted")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merged(word, best): times for word, times in words.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def tokenizer_json(text: str) -> str:
    """tokenizer.json as the tokenizers library reads it: bytes, merges, then the special tokens last."""
    merges = train_merges(text, VOCAB - 256 - len(SPECIAL))
    pieces = [*byte_characters(), *(left + right for left, right in merges)]
    added = [
        {"id": len(pieces) + index, "content": content, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, content in enumerate(SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {piece: index for index, piece in enumerate(pieces)},
        "merges": [list(pair) for pair in merges],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n"


def main(folder: Path) -> None:
    import torch

    from ..parallel.model.random_checkpoint import write_checkpoint

    corpus = (files(__package__) / "tiny_corpus.txt").read_text("utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer_json(corpus), encoding="utf-8")
    write_checkpoint(folder, SPEC, tokenizer, SEED, torch.device("cpu"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
