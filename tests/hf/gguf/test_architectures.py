"""Architectures of GGUF: a model that was written is read back, its config and every bit of its weights."""

import re

import pytest
import torch

from helpers.gguf_families import LLAMA3, LONG, YARN, gguf_families, load_back, save_family
from moeflow.convert.gguf import write_gguf
from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architectures import ARCHITECTURES, architecture_of, find_architecture

FAMILIES = gguf_families()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_model_is_read_back_bit_for_bit(family, tmp_path):
    model = save_family(family, tmp_path / "model")
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    architecture = find_architecture(written.architecture)
    loaded, back = load_back(tmp_path / "model.gguf", architecture)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    unused = back.tensors.keys() - back.used
    assert all(any(re.fullmatch(pattern, name) for pattern in architecture.ignored) for name in unused), unused
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, own = (one(ids, use_cache=False).logits for one in (model, loaded))
    rounded = family.name == "mixtral-llama3"  # a file has its factors, which transformers multiplies otherwise
    assert (wanted - own).abs().max() <= (1e-5 * wanted.abs().max() if rounded else 0)


def test_an_unknown_architecture_is_named():
    with pytest.raises(UnsupportedModelError, match=r"'grok'.*qwen3moe"):
        find_architecture("grok")


def test_a_family_that_is_not_written_is_named():
    class Config:
        model_type = "zaya"

    with pytest.raises(UnsupportedModelError, match="zaya"):
        architecture_of(Config())


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen2moe", "norm_topk_prob", True),
        ("qwen3moe", "norm_topk_prob", False),
        ("qwen3moe", "mlp_only_layers", [0]),
        ("olmoe", "clip_qkv", 8.0),
        ("mixtral", "sliding_window", 64),
        ("gpt-oss", "swiglu_limit", 5.0),
        ("phimoe", "lm_head_bias", False),
        ("hunyuan-moe", "moe_topk", [1, 2, 2]),
        ("ernie4_5-moe", "moe_layer_interval", 2),
        ("qwen3moe", "rope_parameters", LLAMA3),
        ("minimax-m2", "rope_parameters", LONG),
        ("mixtral", "rope_parameters", YARN | {"truncate": False}),
        ("gpt-oss", "rope_parameters", YARN),
        ("olmoe", "num_key_value_heads", 2),
        ("qwen2moe", "head_dim", 64),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, field, value):
    from helpers.family_models import build_config

    config = build_config(FAMILIES[name])
    setattr(config, field, value)
    architecture = architecture_of(config)
    with pytest.raises(UnsupportedModelError):
        architecture.metadata(config)


@pytest.mark.parametrize(
    ("keys", "tensors"),
    [
        ({"rope.scaling.type": "dynamic"}, ()),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, ("rope_freqs.weight",)),
        ({"rope.scaling.attn_factor": 1.5}, ()),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5}, ()),
        ({"attention.head_count_kv": [2, 2, 1]}, ()),
        ({"attention.value_length": 16}, ()),
        ({"expert_group_count": 4}, ()),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(keys, tensors):
    from helpers.family_models import build_config

    config = build_config(FAMILIES["qwen3moe"])
    metadata = ARCHITECTURES["qwen3moe"].metadata(config) | {"tokenizer.ggml.tokens": [""] * config.vocab_size}
    metadata |= {f"qwen3moe.{key}": value for key, value in keys.items()}
    with pytest.raises(UnsupportedModelError):
        ARCHITECTURES["qwen3moe"].config(metadata, {name: lambda: torch.ones(32) for name in tensors})


def test_joined_tensors_are_read_as_those_apart():
    from helpers.family_models import build_model
    from helpers.gguf_families import ReadBack

    model = build_model(FAMILIES["mixtral"])
    rules = ARCHITECTURES["llama"].rules(model.config)
    apart = ReadBack.__new__(ReadBack)
    apart.tensors, apart.used = {}, set()
    state = model.state_dict()
    for name in state:
        rule = next(rule for rule in rules if rule.parameter == re.sub(r"(?<=layers\.)\d+", "{layer}", name))
        layer = (re.findall(r"layers\.(\d+)", name) or [""])[0]
        parts = state[name].chunk(2, 1) if "gate_up" in name else rule.change.write(state[name], model.config)
        apart.tensors |= dict(zip((one.replace("{layer}", layer) for one in rule.tensors), parts, strict=True))
    joined = ReadBack.__new__(ReadBack)
    joined.tensors, joined.used = dict(apart.tensors), set()
    for layer in range(3):
        for target, names, dimension in (
            ("attn_qkv", ("attn_q", "attn_k", "attn_v"), 0),
            ("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), 1),
        ):
            parts = [joined.tensors.pop(f"blk.{layer}.{name}.weight") for name in names]
            joined.tensors[f"blk.{layer}.{target}.weight"] = torch.cat(parts, dimension)
    for back in (apart, joined):
        for name, value in state.items():
            assert torch.equal(back.parameter(name, rules, model), value), name
    assert joined.used == joined.tensors.keys()
