"""The architecture's numbers: what config.json may say, and what every refusal names."""

import json
from pathlib import Path

import pytest
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.spec import (
    PUBLISHED,
    config_from_spec,
    read_config,
    spec_from_config,
    spec_from_json,
    spec_to_json,
)

SPEC_20B = PUBLISHED["openai/gpt-oss-20b"]


@pytest.mark.parametrize("model", PUBLISHED)
def test_config_and_json_round_trip(model: str) -> None:
    spec = PUBLISHED[model]
    assert spec_from_config(config_from_spec(spec), "config.json") == spec
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


def test_rope_as_transformers_5_writes_it() -> None:
    config = config_from_spec(SPEC_20B)
    config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    assert spec_from_config(config, "config.json") == SPEC_20B


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'gpt_oss'"),
        ({"hidden_size": None}, "hidden_size is None, wanted a positive int"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "wanted rope_type 'yarn' with truncate false"),
        ({"layer_types": ["full_attention"]}, "layer_types does not name 24 layers"),
        ({"layer_types": ["chunked"] * 24}, "layer_types does not name 24 layers"),
        ({"intermediate_size": 2881}, "intermediate_size 2881 is no multiple of 32"),
        ({"num_attention_heads": 63}, "num_attention_heads 63 is no multiple of 8"),
        ({"num_experts_per_tok": 33}, "33 experts a token of 32"),
    ],
)
def test_refusal_names_field_and_value(change: dict[str, object], named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_from_spec(SPEC_20B) | change))
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert str(path) in caught.value.message and named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("content", "named"), [("{", "not readable as JSON"), ("[]", "a JSON list, not an object")])
def test_broken_file(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=named):
        read_config(tmp_path / "config.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json in"):
        read_config(tmp_path / "config.json")
