"""Text <-> token ids, from the `tokenizer.json` that lies in a checkpoint folder, with no network.

It does not know conversations (see `harmony.py`) and needs the `tokenizers` library only when a file is loaded.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..parallel.errors import UserError

# https://github.com/openai/harmony/blob/main/docs/format.md, "Special Tokens", and the end-of-text of GPT-2.
REQUIRED_SPECIAL = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|call|>",
    "<|return|>",
    "<|endoftext|>",
)

_FOLDER_HINT = "point at a gpt-oss checkpoint folder, which holds tokenizer.json beside the weights"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE vocabulary; made by `load_tokenizer`.

    special: spelling -> id of every token that is markup, at least `REQUIRED_SPECIAL`.
    vocab_size: one more than the largest id; the model's logits may be longer (padding rows).
    """

    special: Mapping[str, int]
    vocab_size: int
    _bytes_by_id: tuple[bytes, ...] = field(repr=False)
    _library: Any = field(repr=False)  # tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, which is never markup: the spelling of a special token becomes ordinary tokens.

        A lone surrogate (JSON may carry one) becomes U+FFFD, as tiktoken does.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._library.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; often no whole character.

        A special token gives its spelling, an id outside the vocabulary b"".
        """
        return self._bytes_by_id[token_id] if 0 <= token_id < self.vocab_size else b""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, special tokens their spelling."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises UserError if tokenizer.json is missing or broken, if it lacks a token that harmony needs, or if it
    would let the text of a message turn into markup.
    """
    import tokenizers  # here, because the base install (plan, submit, jobs) has none

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing", _FOLDER_HINT)
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise UserError(f"{path} is no tokenizer: {error}", "copy or download the file again") from error
    library.encode_special_tokens = True  # otherwise "<|end|>" in a user's text would be the real token
    library.no_truncation()
    library.no_padding()

    special = {token.content: token_id for token_id, token in library.get_added_tokens_decoder().items()}
    for spelling in REQUIRED_SPECIAL:
        if spelling not in special:
            raise UserError(
                f"{path} has no token {spelling}", f"harmony needs {' '.join(REQUIRED_SPECIAL)}; {_FOLDER_HINT}"
            )
    markup = set(special.values())
    for spelling in special:
        # `encode_special_tokens` holds for tokens marked "special": true alone, and a spelling may also be
        # a plain entry of the vocabulary; so each one is tried.
        if markup.intersection(library.encode(spelling, add_special_tokens=False).ids):
            raise UserError(
                f"{path} turns the text {spelling} into markup",
                'every entry of "added_tokens" must say "special": true',
            )

    vocab = library.get_vocab(with_added_tokens=True)
    bytes_by_id = [b""] * (1 + max(vocab.values()))
    alphabet = _byte_alphabet()
    for token, token_id in vocab.items():
        bytes_by_id[token_id] = token.encode() if token in special else _token_bytes(token, alphabet)
    return Tokenizer(MappingProxyType(special), len(bytes_by_id), tuple(bytes_by_id), library)


def tiktoken_vocabulary(folder: Path) -> bytes:
    """The ordinary tokens of a checkpoint folder as tiktoken has them: one a line, its bytes in base64 and its id.

    Needs no library. Raises UserError.
    """
    path = folder / "tokenizer.json"
    try:
        vocab: dict[str, int] = json.loads(path.read_bytes())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer: {error}", _FOLDER_HINT) from None
    alphabet = _byte_alphabet()
    return b"".join(
        base64.b64encode(_token_bytes(token, alphabet)) + f" {token_id}\n".encode()
        for token, token_id in sorted(vocab.items(), key=lambda entry: entry[1])
    )


def _token_bytes(token: str, alphabet: Mapping[int, int]) -> bytes:
    """Bytes of a vocabulary entry; one that is not spelled in the byte alphabet stands for itself."""
    try:
        return token.translate(alphabet).encode("latin-1")  # 200,000 of them are waited for at every start
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte of byte-level BPE (GPT-2's `bytes_to_unicode`, inverted), as `str.translate` wants it.

    Bytes that Latin-1 can print stand for themselves, the 68 others are moved to U+0100 onwards, in order; their own
    code points stand for no byte, nor do any others.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(moved, _NO_BYTE) | {0x100 + place: byte for place, byte in enumerate(moved)}


_NO_BYTE = 0xFFFF  # a noncharacter, which Latin-1 cannot spell
