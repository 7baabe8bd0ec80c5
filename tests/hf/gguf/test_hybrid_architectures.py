"""Latent, linear and windowed attention in GGUF: what is written is read back, and what cannot be said is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from helpers.hybrid_gguf import MODELS, read_file, read_parameters, tiny_config, tiny_model, write_file, write_tensors
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.hf.gguf.architectures import architecture_of, find_architecture
from moeflow.hf.gguf.changes import GroupedProjections, LatentHeads, ValueHeadColumns, ValueHeadRows
from moeflow.hf.gguf.feeding import feed

TOKENS = torch.arange(16)[None] * 7 % 256


def as_model(config: dict) -> transformers.PreTrainedModel:
    """Return a model of a config's fields, as AutoModel makes one."""
    config = {**config, "attn_implementation": "eager"}
    model_class = getattr(transformers, config.pop("architectures")[0])
    return model_class(transformers.AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_model_written_and_read_is_the_same_model(name, tmp_path):
    model = tiny_model(name, **({"num_hidden_layers": 3} if name == "deepseek-v2-lite" else {}))
    architecture = find_architecture(MODELS[name][0])
    assert architecture_of(model.config) is architecture
    write_file(model, architecture, tmp_path / "model.gguf")

    metadata, tensors = read_file(tmp_path / "model.gguf")
    config = architecture.config(metadata, {name: lambda: torch.empty(0) for name in tensors})
    assert config["model_type"] == model.config.model_type
    read = as_model(config)
    assert read.state_dict().keys() == model.state_dict().keys()
    parameters = read_parameters(read, architecture, tensors)
    for parameter_name, values in parameters.items():
        expected = model.state_dict()[parameter_name]
        if parameter_name.endswith("A_log"):  # the logarithm of an exponential
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(values, expected), parameter_name
    read.load_state_dict(parameters, strict=not model.config.tie_word_embeddings)
    torch.testing.assert_close(read.eval()(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def parts_of(name: str, **changed) -> tuple:
    """Return a tiny model, its architecture, and the metadata and tensors of its file."""
    model = tiny_model(name, **changed)
    architecture = find_architecture(MODELS[name][0])
    metadata = architecture.metadata(model.config) | {"tokenizer.ggml.tokens": [""] * model.config.vocab_size}
    return model, architecture, metadata, write_tensors(model, architecture)


def test_a_file_with_keys_and_values_of_a_latent_in_one_tensor_is_read():
    model, architecture, metadata, tensors = parts_of("kimi-k2")
    for layer in range(3):
        del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
        joined = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        tensors[f"blk.{layer}.attn_kv_b.weight"] = model.state_dict()[joined]
    # such files have the heads' own lengths under the plain names
    for part in ("key", "value"):
        metadata[f"deepseek2.attention.{part}_length"] = metadata.pop(f"deepseek2.attention.{part}_length_mla")
    config = architecture.config(metadata, tensors)
    assert (config["qk_nope_head_dim"], config["v_head_dim"]) == (32, 64)
    parameters = read_parameters(as_model(config), architecture, tensors)
    assert all(torch.equal(parameters[name], values) for name, values in model.state_dict().items())


def test_a_file_with_the_projections_of_linear_attention_as_they_are_is_read():
    model, architecture, _, tensors = parts_of("qwen3next")
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    del tensors["blk.0.attn_qkv.weight"], tensors["blk.0.attn_gate.weight"]
    tensors["blk.0.ssm_in.weight"] = model.state_dict()[name]
    assert torch.equal(read_parameters(model, architecture, tensors)[name], model.state_dict()[name])


def test_rows_that_only_move_are_moved_as_blocks_as_well():
    model, architecture, _, _ = parts_of("qwen35moe")
    for rule in architecture.rules(model.config):
        if rule.change.moves_rows and rule.parameter.endswith(("in_proj_qkv.weight", "in_proj_z.weight")):
            parameter = model.state_dict()[rule.parameter.format(layer=0)]
            (written,) = rule.change.write(parameter, model.config)
            rows = rule.change.read([written[:, :5]], model.config)
            assert torch.equal(rows, parameter[:, :5])


def test_a_head_that_the_file_lacks_is_the_embedding_where_transformers_has_two_parameters():
    model, architecture, metadata, tensors = parts_of("nemotron_h_moe")
    del tensors["output.weight"]
    read = as_model(architecture.config(metadata, tensors))
    head = read_parameters(read, architecture, tensors)["lm_head.weight"]
    assert torch.equal(head, model.get_input_embeddings().weight)


def test_groups_of_softmax_scores_are_chosen_by_their_best_expert():
    _, architecture, metadata, tensors = parts_of("deepseek-v2")
    metadata |= {"deepseek2.expert_group_count": 4, "deepseek2.expert_group_used_count": 2}
    config = architecture.config(metadata, tensors)
    assert (config["topk_method"], config["n_group"], config["topk_group"]) == ("group_limited_greedy", 4, 2)


def test_the_scale_of_yarn_is_that_of_attention():
    _, architecture, metadata, tensors = parts_of("deepseek-v2")
    stored = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in metadata.items()}
    rope = architecture.config(stored, tensors)["rope_parameters"]
    assert (rope["mscale"], rope["mscale_all_dim"]) == (0.707, 0.707)


def test_layers_of_linear_attention_in_no_period_are_listed():
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    _, architecture, metadata, tensors = parts_of("qwen3next", layer_types=kinds)
    assert metadata["qwen3next.attention.recurrent_layers"] == [False, True, True, False]
    assert architecture.config(metadata, tensors)["layer_types"] == kinds


def test_the_block_that_predicts_further_tokens_is_no_layer_and_feeds_nothing():
    model, architecture, metadata, tensors = parts_of("glm4moe")
    metadata |= {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    assert architecture.config(metadata, tensors)["num_hidden_layers"] == 3

    names = list(model.state_dict())
    block = {*tensors, "blk.3.attn_q.weight", "blk.3.nextn.eh_proj.weight"}
    assert feed(architecture, model.config, names, block).keys() == set(names)
    with pytest.raises(CheckpointError, match=r"blk\.3\.attn_q"):
        feed(architecture, model.config, names, block - {"blk.3.nextn.eh_proj.weight"})


def test_value_heads_take_turns_in_the_file():
    config = SimpleNamespace(linear_num_key_heads=2, linear_num_value_heads=6, linear_value_head_dim=2)
    heads = torch.arange(6)  # 0, 1, 2 share the first key head
    assert ValueHeadRows(whole=False).write(heads, config)[0].tolist() == [0, 3, 1, 4, 2, 5]
    rows = torch.arange(13)[:, None]  # one row of something else, then two of each head
    turns = [0, 1, 2, 7, 8, 3, 4, 9, 10, 5, 6, 11, 12]
    assert ValueHeadRows(whole=True, after=lambda config: 1).write(rows, config)[0][:, 0].tolist() == turns
    columns = ValueHeadColumns().write(torch.arange(12)[None], config)[0]
    assert columns[0].tolist() == [number - 1 for number in turns[1:]]


def test_projections_of_a_key_head_are_apart_in_the_file():
    config = SimpleNamespace(
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=1, linear_value_head_dim=1
    )
    rows = torch.arange(12)[:, None]  # of each key head: a query, a key, two values, two gates
    mixed, gates = GroupedProjections().write(rows, config)
    assert mixed[:, 0].tolist() == [0, 6, 1, 7, 2, 3, 8, 9]
    assert gates[:, 0].tolist() == [4, 5, 10, 11]


def test_keys_of_a_latent_are_transposed_in_the_file():
    config = SimpleNamespace(num_attention_heads=2, kv_lora_rank=3, qk_nope_head_dim=2, v_head_dim=1)
    both = torch.arange(18).reshape(6, 3)  # of each head: two rows of keys, one of values
    keys, values = LatentHeads().write(both, config)
    assert keys.tolist() == [[[0, 3], [1, 4], [2, 5]], [[9, 12], [10, 13], [11, 14]]]
    assert values.tolist() == [[[6, 7, 8]], [[15, 16, 17]]]


UNREADABLE = {
    "softmax with a correction": (
        "kimi-k2",
        {"deepseek2.expert_gating_func": 1, "deepseek2.expert_weights_norm": False},
        "exp_probs_b",
    ),
    "another scoring function": ("kimi-k2", {"deepseek2.expert_gating_func": 4}, "function 4"),
    "softmax that is normalised": ("deepseek-v2", {"deepseek2.expert_weights_norm": True}, "normalised"),
    "sigmoid without a correction": ("deepseek-v2", {"deepseek2.expert_gating_func": 2}, "without exp_probs_b"),
    "scaled queries": ("kimi-k2", {"deepseek2.attention.temperature_scale": 0.1}, "temperature_scale"),
    "yarn without its factor": (
        "deepseek-v3",
        {"deepseek2.rope.scaling.yarn_log_multiplier": 0.0},
        "yarn_log_multiplier",
    ),
    "positions scaled otherwise": ("kimi-k2", {"deepseek2.rope.scaling.factor": 2.0}, "linear"),
    "a model that sees": ("glm4moe", {"glm4moe.rope.dimension_sections": [8, 12, 12, 0]}, "sees"),
    "softmax in GLM": ("glm4moe", {"glm4moe.expert_gating_func": 1}, "softmax"),
    "another period": ("afmoe", {"afmoe.attention.sliding_window_pattern": 6}, "every 6"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_no_model_of_transformers_is_like_is_refused(case):
    name, changed, message = UNREADABLE[case]
    _, architecture, metadata, tensors = parts_of(name)
    with pytest.raises(UnsupportedModelError, match=message):
        architecture.config(metadata | changed, tensors)


UNWRITABLE = {
    "biases": ("kimi-k2", {"attention_bias": True}, "attention_bias"),
    "halves": ("kimi-k2", {"rope_interleave": False}, "rope_interleave"),
    "two scales of yarn": (
        "deepseek-v3",
        {"rope_parameters": {**MODELS["deepseek-v3"][2]["rope_parameters"], "mscale": 0.5}},
        "0.5, 1.0 and None",
    ),
    "heads of two sizes": ("qwen3next", {"linear_value_head_dim": 16}, "keys of 32 and values of 16"),
    "scores as they are": ("qwen3next", {"norm_topk_prob": False}, "norm_topk_prob"),
    "dense layers": ("qwen3next", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "biases of convolutions": ("lfm2moe", {"conv_bias": True}, "conv_bias"),
    "multiplied scores": ("lfm2moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor"),
    "embeddings as they are": ("afmoe", {"mup_enabled": False}, "mup_enabled"),
    "groups by their best expert": ("deepseek-v2", {"topk_method": "group_limited_greedy"}, "topk_method"),
    "a head that is the embedding": ("dots1", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    "an MLP between experts": ("nemotron_h_moe", {"layers_block_type": ["mlp", "moe"]}, "dense MLP"),
    "convolutions without biases": ("nemotron_h_moe", {"use_conv_bias": False}, "use_conv_bias"),
    "fewer heads of keys": ("dots1", {"num_key_value_heads": 2}, "heads of keys"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_config_that_a_file_cannot_say_is_refused(case):
    name, changed, message = UNWRITABLE[case]
    config = tiny_config(name, **changed)
    with pytest.raises(UnsupportedModelError, match=message):
        architecture_of(config).metadata(config)
