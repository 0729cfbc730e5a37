"""The experts of a layer of 20b by llama.cpp's ggml beside `cpu_products.py`: `python bench_ggml.py SDIST`.

    pip download llama-cpp-python --no-deps --no-binary :all:

gives SDIST, whose ggml is built for this CPU with cmake in some minutes. ggml rounds activations to 8 bits, as our int8
way does. Prints a JSON line for each number of tokens; rounds take 423 MB of experts in turn, and the best counts.
"""

import argparse
import subprocess
import tarfile
import tempfile
from pathlib import Path

SWITCHES = ("BUILD_TESTS", "BUILD_EXAMPLES", "STANDALONE", "CCACHE")


def build(sdist: Path, folder: Path) -> Path:
    """The program, from ggml's sources within `sdist` and ours."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, [one for one in archive if "/vendor/llama.cpp/ggml/" in one.name], filter="data")
    (ggml,) = folder.glob("*/vendor/llama.cpp/ggml")
    (ggml / "ggml.pc.in").touch()  # which the archive lacks
    made, program = folder / "build", folder / "bench_ggml"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
    options += [f"-DGGML_{name}=OFF" for name in SWITCHES]
    subprocess.run(["cmake", "-S", str(ggml), "-B", str(made), *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(made), "-j"], check=True, stdout=subprocess.DEVNULL)
    libraries = [str(next(made.rglob(f"lib{name}.a"))) for name in ("ggml", "ggml-cpu", "ggml-base")]
    source = str(Path(__file__).with_suffix(".c"))
    command = ["cc", "-O2", f"-I{ggml / 'include'}", source, "-o", str(program), *libraries]
    subprocess.run([*command, "-lstdc++", "-lm", "-lpthread", "-fopenmp", "-ldl"], check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--tokens", default="1,2,8,64")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--seconds", default="15", help="of each number of tokens")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build(asked.sdist, Path(folder))
        for tokens in asked.tokens.split(","):
            subprocess.run([str(program), tokens, asked.threads, asked.seconds], check=True)


if __name__ == "__main__":
    main()
