"""Decoding by a step program: transformers' tokens, the same bits at any budget, the model's own way where asked."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PhimoeConfig, PhimoeForCausalLM

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.errors import ConfigError
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 64]])
NUM_TOKENS = 70  # beyond the positions that a cache has room for at first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step") / "model"
    tiny_mixtral().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eager(folder):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


@pytest.fixture
def load(folder):
    """Load the model with native steps; every one is closed after the test."""
    made = []

    def load(**options):
        options = {"expert_memory": "100%", "predictor": None, "step": "auto", "device": "cpu", **options}
        made.append(load_moe(folder, **options))
        return made[-1]

    yield load
    for model in made:
        model.moeflow.close()


def answer(model, prompt=PROMPT, **options):
    """Token ids that a model generates greedily, and the logits that it chose them by."""
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    out = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits)


def test_tokens_are_those_of_transformers_and_every_step_but_the_first_is_native(load, eager):
    model = load()
    tokens, logits = answer(model)
    expected, expected_logits = answer(eager)
    assert torch.equal(tokens, expected)
    assert (logits - expected_logits).abs().max() <= 1e-5 * expected_logits.abs().max()
    assert model.moeflow.stats()["step"] == {"mode": "native", "reason": None, "steps": NUM_TOKENS - 1}


def test_the_bits_are_the_same_at_any_budget_and_number_of_threads(load):
    _, expected = answer(load())
    for budget in ("70%", "40%", "15%"):
        model = load(expert_memory=budget)
        _, logits = answer(model)
        assert torch.equal(logits, expected), budget
        assert model.moeflow.stats()["step"]["steps"] == NUM_TOKENS - 1
        model.moeflow.check_integrity()
    torch.set_num_threads(2)
    try:
        assert torch.equal(answer(load())[1], expected)
    finally:
        torch.set_num_threads(1)


def test_heads_of_any_number_of_features(tmp_path):
    tiny_mixtral(head_dim=2304, num_hidden_layers=1).save_pretrained(tmp_path)
    model = load_moe(tmp_path, device="cpu", expert_memory="100%", predictor=None, step="auto")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with model.moeflow:
        logits, expected = answer(model)[1], answer(plain)[1]
        assert model.moeflow.step.num_steps == NUM_TOKENS - 1
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_hits_and_misses_are_counted_as_without_it(load):
    counted = {}
    for step in ("python", "auto"):
        model = load(expert_memory="50%", step=step, policy="lru")
        answer(model)  # the first native step is compared with the model's own before
        model.moeflow.reset_stats()
        answer(model)
        decode = model.moeflow.stats()["decode"]
        counted[step] = {name: decode[name] for name in ("forwards", "tokens", "hits", "misses")}
        assert decode["decisions"]["layers_ready"] + decode["decisions"]["layers_waited"] > 0
    assert counted["auto"]["forwards"] == counted["python"]["forwards"] == NUM_TOKENS - 1
    assert sum(counted["auto"][name] for name in ("hits", "misses")) == sum(
        counted["python"][name] for name in ("hits", "misses")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_the_program_does_not_know_is_the_models_own(load, eager, options):
    options = {**options, "max_new_tokens": 12}
    assert torch.equal(answer(load(), **options)[0], answer(eager, **options)[0])


def test_padding_on_the_left_is_not_seen(load, eager):
    model = load()
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), PROMPT], 1)
    mask = (torch.arange(12) >= 5).long()[None]
    for tested in (model, eager):
        tested.config.pad_token_id = 0
    tokens, _ = answer(model, padded, attention_mask=mask)
    assert torch.equal(tokens, answer(eager, padded, attention_mask=mask)[0])
    assert torch.equal(tokens[:, 5:], answer(eager)[0])
    assert model.moeflow.step.num_steps == NUM_TOKENS - 1


def test_a_batch_and_a_cache_of_the_users_are_the_models_own(load, eager):
    model, batch = load(), PROMPT.repeat(3, 1)
    assert torch.equal(answer(model, batch)[0], answer(eager, batch)[0])
    own = answer(model, past_key_values=DynamicCache(config=model.config))[0]
    assert torch.equal(own, answer(eager)[0])
    assert model.moeflow.step.num_steps == 0


def test_a_hook_another_module_and_other_weights_are_noticed(load, eager):
    model = load()
    answer(model)
    steps = model.moeflow.step.num_steps
    layer = model.model.layers[1]

    seen = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(answer(model)[0], answer(eager)[0])
    assert len(seen) == NUM_TOKENS
    hook.remove()
    assert model.moeflow.step.num_steps == steps

    class Silent(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    norm, layer.input_layernorm = layer.input_layernorm, Silent()
    changed, _ = answer(model)
    assert model.moeflow.step.num_steps == steps
    layer.input_layernorm = norm
    assert not torch.equal(changed, answer(model)[0])
    assert model.moeflow.step.num_steps == 2 * steps

    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.flip(0).contiguous()
    other, _ = answer(model)
    assert model.moeflow.step.num_steps == 2 * steps
    assert not torch.equal(other, changed)


def test_autocast_and_gradients_are_the_models_own(load):
    model = load()
    with torch.autocast("cpu", torch.bfloat16):
        answer(model, max_new_tokens=5)
    cache = model.generate(PROMPT, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    with torch.enable_grad():
        out = model(input_ids=torch.tensor([[4]]), past_key_values=cache.past_key_values)
    assert out.logits.requires_grad
    assert model.moeflow.step.num_steps == 1


def test_a_token_that_is_not_in_the_vocabulary_is_refused(load):
    model = load()
    answer(model, max_new_tokens=4)
    made = model.generate(PROMPT, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    with torch.no_grad(), pytest.raises(Exception, match=r"outside|out of range"):
        model(input_ids=torch.tensor([[10**6]]), past_key_values=made.past_key_values)
    assert torch.equal(answer(model)[0], answer(load())[0])


def test_a_step_that_depends_on_the_position_by_pythons_way_is_the_models_own(tmp_path):
    """LongRoPE has one scaling up to a length and another beyond: a captured step has but one."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 8.0,
        "short_factor": [1.0] * 8, "long_factor": [4.0 + 3 * i for i in range(8)], "short_mscale": 1.0,
        "long_mscale": 1.2,
    }  # fmt: skip
    config = PhimoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        original_max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    PhimoeForCausalLM(config).eval().save_pretrained(tmp_path)
    own, model = (
        load_moe(tmp_path, device="cpu", expert_memory="100%", predictor=None, step=step) for step in ("python", "auto")
    )
    with own.moeflow, model.moeflow:
        assert torch.equal(answer(model)[0], answer(own)[0])
        assert model.moeflow.stats()["step"]["mode"] == "python"
        assert model.moeflow.stats()["step"]["reason"]


def test_a_program_reads_as_text(load):
    model = load()
    answer(model, max_new_tokens=3)
    text = model.moeflow.step.text()
    assert text.count(" = experts ") == text.count(" = attend ") == 3
    assert "torch" not in text.replace("torch.", "")


@pytest.mark.parametrize("options", [{"compile": True}, {"step": "fast"}])
def test_options_that_do_not_fit_are_refused(load, options):
    with pytest.raises(ConfigError, match="step="):
        load(**options)


def test_a_closed_model_says_so(load):
    model = load()
    answer(model, max_new_tokens=4)
    model.moeflow.close()
    with pytest.raises(Exception, match="closed"):
        answer(model)
