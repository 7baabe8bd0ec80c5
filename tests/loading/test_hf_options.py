"""Options of from_pretrained given to load_moe: obeyed, or refused with what to use instead; none dropped."""

import inspect
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import auto_factory

from moeflow import load_moe
from moeflow.errors import ConfigError
from moeflow.loading import hf_options


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"max_memory": {0: "1GiB"}}, "expert_memory="),
        ({"offload_folder": "there"}, "expert_memory="),
        ({"offload_state_dict": True}, "expert_memory="),
        ({"device_map": "auto", "max_memory": {"cpu": "1GiB"}}, "device="),
        ({"low_cpu_mem_usage": False}, "never in memory twice"),
        ({"use_safetensors": False}, "never unpickles"),
        ({"load_in_8bit": True}, 'quantization="int8"'),
        ({"load_in_4bit": True}, 'quantization="int4"'),
        ({"tp_plan": "auto"}, "moeflow parallel"),
        ({"use_kernels": True}, "its own kernels"),
        ({"adapter_name": "mine"}, "load_adapter"),
        ({"expert_memroy": "50%"}, "Did you mean expert_memory"),
        ({"offload_dir": "there"}, "no option"),
        ({"mirror": "there"}, "no option"),
        ({"from_tf": True}, "no option"),
        ({"_fast_init": True}, "no option"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(mixtral_folder, options, instead):
    name = next(iter(options))
    with pytest.raises(ConfigError, match=f"does not take {name}: .*{re.escape(instead)}"):
        load_moe(mixtral_folder, device="cpu", **options)


def test_what_is_left_open_or_done_anyway_loads(mixtral_folder):
    options = dict.fromkeys(hf_options._REFUSED, None) | {
        "low_cpu_mem_usage": True,
        "use_safetensors": True,
        "weights_only": True,
    }
    options["load_in_4bit"] = options["use_kernels"] = False
    load_moe(mixtral_folder, device="cpu", expert_memory="50%", **options).moeflow.close()


def test_every_option_that_transformers_reads_is_decided(mixtral_folder):
    """A new option of transformers must be obeyed or refused with what to use instead; these it takes and ignores."""
    source = inspect.getsource(PreTrainedModel.from_pretrained) + inspect.getsource(
        auto_factory._BaseAutoModelClass.from_pretrained
    )
    read = {*re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', source)}
    read |= set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    ignored = {"cls", "kwargs", "model_args", "pretrained_model_name_or_path", "_commit_hash", "_from_auto", "dtype"}
    ignored |= {"_from_pipeline", "proxies", "tqdm_class", "code_revision"}
    assert read - ignored <= {*hf_options._OBEYED, *hf_options._REFUSED}


def test_options_that_are_obeyed_do_what_they_do_in_transformers(mixtral_folder):
    model, info = load_moe(
        mixtral_folder,
        device="cpu",
        expert_memory="50%",
        attn_implementation="eager",
        output_loading_info=True,
        num_experts=8,  # transformers' other name of num_local_experts
        num_experts_per_tok=1,
    )
    plain = AutoModelForCausalLM.from_pretrained(mixtral_folder, num_experts_per_tok=1, dtype=torch.float32)
    with model.moeflow, torch.no_grad():
        ids = torch.arange(3, 12)[None]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "eager"
    assert not info["missing_keys"]
