"""Settings: precedence, types, and what a wrong file is told."""

from pathlib import Path

import pytest
from gptoss_launch.launch.settings import ServeSettings, Settings, load_settings, preset_names
from gptoss_launch.parallel.errors import UserError


def test_defaults() -> None:
    settings = load_settings(ServeSettings, None, {})
    assert settings == ServeSettings()
    assert (settings.host, settings.port, settings.drain_s) == ("127.0.0.1", 8000, 30.0)
    assert settings.machine is None and settings.context_tokens is None


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("port: 9000\ncontext: 4096\ngpu_memory: 11GiB\ndrain_s: 5\napi_key_file: ~/key\n")
    settings = load_settings(ServeSettings, str(path), {"port": 9001, "context_tokens": None})
    assert settings == ServeSettings(
        port=9001, context_tokens=4096, gpu_memory_bytes=11 << 30, drain_s=5.0, api_key_file=Path.home() / "key"
    )
    assert load_settings(Settings, str(path), {}) == Settings(context_tokens=4096, gpu_memory_bytes=11 << 30)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_reads(name: str) -> None:
    load_settings(ServeSettings, name, {})


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_settings(ServeSettings, str(tmp_path / "empty.yaml"), {}) == ServeSettings()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("contxt: 4096", ["unknown key 'contxt'", "did you mean context?"]),
        ("1: 2", ["unknown key 1"]),
        ("port: 70000", ["port: 70000 is no whole number from 0 to 65535"]),
        ("port: true", ["port: True is no whole number"]),
        ("context: 0", ["context: 0 is no whole number from 1"]),
        ("dtype: int8", ["dtype: 'int8' is none of bf16, fp16, fp32"]),
        ("gpu_memory: lots", ["gpu_memory: 'lots' is no size"]),
        ("rest: nf4", ["rest: nf4 needs a scale for each 64 values of a row"]),
        ("rest: 4", ["rest: 4 is none of bf16, fp8, int8"]),
        ("rest_kl: 0", ["rest_kl: 0 is no positive number of nats"]),
        ("drain_s: soon", ["drain_s: 'soon' is no number of seconds"]),
        ("drain_s: .nan", ["is no number of seconds"]),
        ("host: 1", ["host: 1 is no text"]),
        ("- port", ["a list, not a mapping"]),
        ("port: [", ["no YAML"]),
        ("port: 1\nhost: a\nport: 2", ["key 'port' twice", "line 3"]),
    ],
)
def test_wrong_files_name_file_key_and_near_match(text: str, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(ServeSettings, str(path), {})
    assert all(words in str(caught.value) for words in [str(path), *named])
    assert "\n" not in caught.value.message
