"""LoadOptions: signature, docstring, flags and the documentation's table all say what the dataclass says."""

import argparse
import inspect
import re
from dataclasses import fields

import pytest

from helpers.paths import ROOT
from moeflow import load_moe
from moeflow.cli.options import add_loading_options
from moeflow.errors import ConfigError
from moeflow.loading.options import LoadOptions, flag_options
from moeflow.policy.cache import POLICIES

OPTIONS = fields(LoadOptions)


def test_signature_of_load_moe_has_the_options_with_their_defaults():
    parameters = inspect.signature(load_moe).parameters
    given = {name: one.default for name, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    assert list(given.items()) == [(option.name, option.default) for option in OPTIONS]


def test_docstring_of_load_moe_says_what_the_options_mean():
    arguments = inspect.getdoc(load_moe).partition("Args:")[2].partition("Returns:")[0]
    said = dict(re.findall(r"^    (\w+): (.*?)(?=\n    \S)", arguments, re.MULTILINE | re.DOTALL))
    for option in OPTIONS:
        assert " ".join(said[option.name].split()) == option.metadata["meaning"], option.name


def test_docs_have_the_table_of_options():
    rows = [f"| `{option.name}` | `{option.default!r}` | {option.metadata['meaning']} |" for option in OPTIONS]
    table = "\n".join(["| option of `load_moe` | default | meaning |", "|---|---|---|", *rows])
    assert table in (ROOT / "docs" / "loading.md").read_text(), f"the table of docs/loading.md should be\n{table}"


def test_flags_are_the_options_that_have_one():
    parser = argparse.ArgumentParser()
    add_loading_options(parser)
    flags = vars(parser.parse_args([]))
    assert flags.pop("json") is False
    assert flags.pop("loading_flags") == [option.name for option in flag_options()]
    assert flags == {option.name: option.default for option in flag_options()}
    assert [option.name for option in OPTIONS if option not in flag_options()] == ["kv_memory", "trace"]
    for option in flag_options():
        assert f"--{option.name.replace('_', '-')}" in parser.format_help()


def test_policies_are_those_of_the_cache():
    choices = {option.name: option.metadata["choices"] for option in OPTIONS}
    assert choices["policy"] == ("auto", *POLICIES)


@pytest.mark.parametrize("prune", [-0.1, 1.5, True, "half", None])
def test_prune_is_a_share(prune):
    with pytest.raises(ConfigError, match="is not a share"):
        LoadOptions(prune=prune)


def test_a_format_is_told_by_its_full_name():
    assert LoadOptions(quantization="int4").weight_format == "int4-g64"
    assert LoadOptions().weight_format is None
    with pytest.raises(ConfigError):
        LoadOptions(quantization="int5")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp8"}, "float32, bfloat16, float16 or float64"),
        ({"dtype": "float8_e4m3fn"}, "float32, bfloat16, float16 or float64"),
        ({"dtype": "int8"}, "float32, bfloat16, float16 or float64"),
        ({"dtype": "nn"}, "dtype is 'nn'"),
        ({"dtype": 3}, "dtype is 3"),
        ({"dtype": float}, "dtype is <class 'float'>"),
        ({"kv_memory": "25%"}, "share of nothing"),
        ({"memory": "25%"}, "memory='25%' is a share of nothing"),
        ({"memory": "much"}, "memory='much' is not a memory size"),
        ({"memory": "1GB", "kv_memory": "1MB"}, "kv_memory='1MB' fixes one of them. Drop kv_memory"),
        ({"memory": "1GB", "expert_memory": "25%"}, "expert_memory='25%' fixes one of them. Drop expert_memory"),
        ({"memory": "1GB", "plan": "plan.json"}, "memory='1GB' was given beside a plan"),
        ({"kv_memory": "much"}, "kv_memory='much' is not a memory size"),
        ({"device": None}, "cuda:N"),
        ({"device": 10**30}, "cuda:N"),
        ({"device": "xpu"}, "not supported"),
        ({"quantization": ["int4"]}, "quantization is"),
        ({"predictor": 3}, "predictor is 3"),
        ({"trace": 3}, "trace is 3"),
        ({"trace": ""}, "trace is ''"),
        ({"policy": ["lru"]}, "policy="),
        ({"cuda_graphs": True}, "this model runs on the CPU. Leave it False"),
        ({"cuda_graphs": "yes"}, "cuda_graphs='yes' is neither True nor False"),
    ],
)
def test_an_option_of_another_kind_says_what_is_allowed(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        LoadOptions(**{"device": "cpu", **options})


@pytest.mark.parametrize("name", ["bf16", "BF16", "torch.bfloat16", "bfloat16"])
def test_a_dtype_has_several_names(name):
    assert str(LoadOptions(dtype=name).torch_dtype) == "torch.bfloat16"


def test_the_processor_has_no_number():
    assert str(LoadOptions(device="cpu:0").torch_device) == "cpu"
