"""What generate and serve refuse before anything starts: one line, a hint, exit 2."""

import pytest
from gptoss_launch.launch.cli import run

CASES = {
    "no prompt": ([], "generate takes one prompt"),
    "two prompts": (["-p", "x", "--token-ids", "{ids}"], "generate takes one prompt"),
    "no such file": (["--token-ids", "nowhere"], "--token-ids nowhere: not readable"),
    "no ids": (["--token-ids", "{empty}"], "no ids in it"),
    "words": (["--token-ids", "{words}"], "'one' is no token id"),
    "no integers": (["--token-ids", "{floats}"], "1.5 is no token id"),
    "an id too large": (["--token-ids", "{large}"], "token id 99999 at place 1: the vocabulary has 1024"),
    "a negative id": (["--token-ids", "{negative}"], "token id -1 at place 0"),
    "prompt over the context": (["--token-ids", "{ids}", "--context", "3"], "more than the context of 3"),
    "answer over the context": (
        ["-p", "x", "--max-tokens", "1000", "--context", "512"],
        "more than the context of 512",
    ),
    "temperature": (["-p", "x", "--temperature", "9"], "temperature"),
    "unknown option": (["--promt", "x"], "--promt"),
}
FILES = {"ids": "1 2 3", "empty": " ", "words": "one two", "floats": "[1.5]", "large": "[1, 99999]", "negative": "-1"}


@pytest.mark.parametrize("name", CASES)
def test_generate_refuses(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("asyncio.run", None)  # nothing may start
    monkeypatch.chdir(tmp_path)
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    arguments, message = CASES[name]
    names = {file: file for file in FILES}
    code = run(["generate", "tiny", "--machine", "cpu", *(argument.format(**names) for argument in arguments)])
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert message in said.err.splitlines()[0] and said.err.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize("text, message", [(None, "No such file"), ("\n# none\n", "no key in it")])
def test_serve_wants_a_key_in_the_key_file(capsys, tmp_path, text, message):
    file = tmp_path / "key"
    if text is not None:
        file.write_text(text)
    assert run(["serve", "tiny", "--port", "0", "--api-key-file", str(file)]) == 2
    assert message in capsys.readouterr().err
