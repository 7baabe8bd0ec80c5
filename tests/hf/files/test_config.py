"""config.json: whatever is wrong with it is told in one line that names the file, and often the field."""

import json
import shutil

import pytest
import torch

from moeflow import load_moe
from moeflow.errors import CheckpointError, ConfigError, MoeflowError, UnsupportedModelError
from moeflow.hf.files.config import load_config
from moeflow.loading.describe import describe_model


@pytest.fixture
def folder(mixtral_folder, tmp_path):
    """A copy of the checkpoint whose config a test may change."""
    return shutil.copytree(mixtral_folder, tmp_path / "model")


def change(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(call, kind=MoeflowError) -> str:
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said, "one line"
    assert len(said) < 700
    return said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "holds a list"),
        (b"3", "holds a int"),
        (b"null", "holds a NoneType"),
        (b'"mixtral"', "holds a str"),
        (b"", "is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"a": ' * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xe9"}', "not UTF-8"),
    ],
)
def test_a_file_that_is_no_object_says_what_it_is(folder, content, said):
    (folder / "config.json").write_bytes(content)
    for call in (describe_model, load_moe):
        message = refused(lambda call=call: call(folder), CheckpointError)
        assert f"{folder / 'config.json'} " in message
        assert said in message


@pytest.mark.parametrize("value", ["8", None, 8.0, float("nan"), -1, 10**30, 10**6, True, [1], {"a": 1}])
@pytest.mark.parametrize("field", ["num_local_experts", "num_hidden_layers"])
def test_a_count_of_another_type_or_size_names_file_and_field(folder, field, value):
    change(folder, **{field: value})
    for call in (describe_model, load_moe):
        message = refused(lambda call=call: call(folder), ConfigError)
        assert str(folder / "config.json") in message
        assert field in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2', which is unknown"),
        ({"hidden_act": 5}, "hidden_act"),
        ({"sliding_window": "8"}, "sliding_window"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": -64}, "config.json"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
        ({"layer_types": 5}, "layer_types"),
        ({"dtype": "swish2"}, "dtype is 'swish2'; a model computes in float32"),
        ({"dtype": "int8"}, "dtype is torch.int8; a model computes in float32"),
        ({"dtype": 5}, "dtype is 5"),
        ({"dtype": {"": None}}, "dtype is None"),
        ({"quantization_config": []}, "quantization_config"),
        ({"quantization_config": 5}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 5}}, "quantization_config"),
        ({"auto_map": 5}, "TypeError"),
        ({"num_labels": 10**8}, "num_labels is 100000000"),
        ({"eos_token_id": [2] * 100_000}, "eos_token_id has 100000 entries"),
        ({"rope_parameters": {"short_factor": [1.0] * 100_000}}, "rope_parameters has 100000 entries"),
    ],
)
def test_a_field_that_cannot_be_is_named(folder, fields, said):
    change(folder, **fields)
    for call in (describe_model, load_moe):
        message = refused(lambda call=call: call(folder), ConfigError)
        assert str(folder / "config.json") in message
        assert said in message


@pytest.mark.parametrize("value", ["nothing-known", None, 5, ["mixtral"]])
def test_an_unknown_architecture_is_named(folder, value):
    change(folder, model_type=value)
    assert repr(value) in refused(lambda: load_config(folder), UnsupportedModelError)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "intermediate_size", "head_dim"])
def test_a_model_far_larger_than_its_files_is_refused_before_memory_is_taken(folder, name):
    change(folder, **{name: 10**9})
    for call in (describe_model, load_moe):
        assert "values, and the folder's files have" in refused(lambda call=call: call(folder), CheckpointError)


def test_a_weight_of_another_shape_is_named(folder):
    change(folder, vocab_size=200)
    message = refused(lambda: load_moe(folder), CheckpointError)
    assert "model.embed_tokens.weight is [200, 64] by the config and [128, 64]" in message or "lm_head" in message


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", "BF16", "bfloat16"])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_clear_names_of_a_dtype_are_read(folder, field, name):
    change(folder, **{"dtype": None, field: name})
    assert load_config(folder).dtype == torch.bfloat16
    model = load_moe(folder, expert_memory="50%")
    model.moeflow.close()
    assert model.dtype == torch.bfloat16


def test_a_config_that_is_given_is_checked_as_the_file_is(folder):
    config = load_config(folder)
    assert "config is a dict" in refused(lambda: load_moe(folder, config=config.to_dict()), ConfigError)
    assert "num_local_experts='8'" in refused(lambda: load_moe(folder, num_local_experts="8"), ConfigError)
    assert "num_hidden_layers is 1000000" in refused(lambda: load_moe(folder, num_hidden_layers=10**6), ConfigError)
    config.num_hidden_layers = 10**6
    assert "num_hidden_layers is 1000000" in refused(lambda: load_moe(folder, config=config), ConfigError)
    for source in (folder, folder / "config.json", str(folder)):
        load_moe(folder, config=source, expert_memory="50%").moeflow.close()
