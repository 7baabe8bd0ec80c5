"""A model that was changed after it was loaded decodes by its own code, as transformers' does, until that is undone."""

import logging
import types
from contextlib import contextmanager

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.native_steps import cache_after, compare, generate, go_on
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")


class Negative(torch.nn.Module):
    """A parametrization."""

    def forward(self, x):
        return -x


class Adapter(torch.nn.Module):
    """A linear and a low-rank term, as adapters have it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(1)
        shapes = (4, base.in_features), (base.out_features, 4)
        self.down, self.up = (torch.nn.Parameter(torch.randn(shape, generator=generator) / 8) for shape in shapes)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Branching(torch.nn.Module):
    """Control flow that depends on data."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) if x.sum() > 0 else self.base(x) * 2


def damped(*args, **kwargs):
    """Attention of a caller's."""
    out, weights = sdpa_attention_forward(*args, **kwargs)
    return out * 0.5, weights


@contextmanager
def put(target, name, value):
    """Set an attribute, and the one before it again."""
    was_own, before = name in vars(target), getattr(target, name)
    setattr(target, name, value)
    yield
    if was_own:
        setattr(target, name, before)
    else:
        delattr(target, name)


@contextmanager
def child(parent, name, kind):
    """Wrap a child module."""
    own = getattr(parent, name)
    setattr(parent, name, kind(own))
    yield
    setattr(parent, name, own)


@contextmanager
def hook(register, *args, **kwargs):
    """A hook that sees something, on one module or on all."""
    seen = []
    handle = register(lambda *given: seen.append(given), *args, **kwargs)
    yield
    handle.remove()
    assert seen


@contextmanager
def forward_of_model(model):
    own = model.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = -out.logits
        return out

    with put(model, "forward", forward):
        yield


@contextmanager
def forward_of_base(model):
    own = model.model.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.last_hidden_state = -out.last_hidden_state
        return out

    with put(model.model, "forward", forward):
        yield


def forward_of_block(model):
    block = model.model.layers[0].mlp
    return put(block, "forward", types.MethodType(lambda self, x: x * 0.5, block))


@contextmanager
def forward_of_class(model):
    norm = model.model.layers[1].input_layernorm
    kind, own = type(norm), type(norm).forward
    kind.forward = lambda self, x: own(self, x) * (2 if self is norm else 1)
    yield
    kind.forward = own


@contextmanager
def another_class(model):
    norm = model.model.layers[1].input_layernorm
    kind = type(norm)
    norm.__class__ = type("Doubling", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})
    yield
    norm.__class__ = kind


@contextmanager
def weight_of_another_parameter(model):
    own = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(own.detach().flip(0).contiguous())
    yield
    model.lm_head.weight = own


@contextmanager
def weight_elsewhere(model):
    own = model.lm_head.weight.data
    model.lm_head.weight.data = own.flip(0).contiguous()
    yield
    model.lm_head.weight.data = own


@contextmanager
def buffer(model):
    rotary = model.model.rotary_emb
    own, rotary.inv_freq = rotary.inv_freq, rotary.inv_freq * 3
    yield
    rotary.inv_freq = own


@contextmanager
def tied(model):
    own = model.lm_head.weight
    model.lm_head.weight = model.model.embed_tokens.weight
    yield
    model.lm_head.weight = own


@contextmanager
def parametrized(model):
    linear = model.model.layers[0].self_attn.q_proj
    parametrize.register_parametrization(linear, "weight", Negative())
    yield
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


@contextmanager
def part_in_training(model):
    attention = model.model.layers[0].self_attn.train()
    torch.manual_seed(0)
    with put(attention, "attention_dropout", 0.5):
        yield
    attention.eval()


@contextmanager
def attention_of_the_callers(model):
    AttentionInterface.register("damped", damped)
    ALL_MASK_ATTENTION_FUNCTIONS.register("damped", sdpa_mask)
    model.set_attn_implementation("damped")
    yield
    model.set_attn_implementation("sdpa")


@contextmanager
def attention_under_a_known_name(model):
    ALL_ATTENTION_FUNCTIONS["sdpa"] = damped
    yield
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward


CHANGES = {
    "hook": lambda model: hook(model.model.norm.register_forward_hook),
    "hook with keywords": lambda model: hook(
        model.model.layers[1].self_attn.register_forward_hook, with_kwargs=True
    ),
    "hook before": lambda model: hook(model.model.layers[0].mlp.experts.register_forward_pre_hook),
    "hook on the model": lambda model: hook(model.register_forward_pre_hook, with_kwargs=True),
    "hook on all": lambda model: hook(register_module_forward_hook),
    "hook before all": lambda model: hook(register_module_forward_pre_hook),
    "adapter": lambda model: child(model.model.layers[0].self_attn, "v_proj", Adapter),
    "control by data": lambda model: child(model.model.layers[0].self_attn, "o_proj", Branching),
    "top_k": lambda model: put(model.model.layers[1].mlp.gate, "top_k", 1),
    "scaling": lambda model: put(model.model.layers[1].self_attn, "scaling", 1.0),
    "layers": lambda model: put(model.config, "num_hidden_layers", 2),
    "window": lambda model: put(model.config, "sliding_window", 4),
    "eps": lambda model: put(model.model.layers[1].input_layernorm, "variance_epsilon", 1.0),
    **{
        change.__name__: change
        for change in (
            forward_of_model, forward_of_base, forward_of_block, forward_of_class, another_class,
            weight_of_another_parameter, weight_elsewhere, buffer, tied, parametrized, part_in_training,
            attention_of_the_callers, attention_under_a_known_name,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_with_one_warning(pair, name, caplog):
    def ask(model):
        with CHANGES[name](model):
            found = generate(model) + generate(model)
            if model is pair.native:
                reasons.append(model.moeflow.stats()["step"]["reason"])
            return found

    reasons = []
    with caplog.at_level(logging.WARNING, logger="moeflow"):
        assert compare(pair, ask) == 0
    warned = [record for record in caplog.records if reasons[0] in record.getMessage()]
    assert len(warned) <= 1  # none where the same was found before
    generate(pair.native)
    assert pair.native.moeflow.stats()["step"]["reason"] is None


def test_a_hook_between_two_steps_is_noticed(pair):
    def ask(model):
        cache = cache_after(model)
        made = go_on(model, cache)
        with hook(model.model.layers[2].post_attention_layernorm.register_forward_hook):
            made += go_on(model, cache, 5)
        with child(model.model.layers[0].self_attn, "k_proj", Adapter):
            made += go_on(model, cache, 6)
        return made + go_on(model, cache, 7)

    assert compare(pair, ask) == 1 + 3 + 3


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_are_changed_in_place_are_used_as_they_are(pair, through_data):
    """What a program computes of weights once, it computes again."""
    names = ("norm", "gate", "inv_freq", "q_proj")

    def ask(model):
        weights = [
            weight.data if through_data else weight
            for name, weight in [*model.named_parameters(), *model.named_buffers()]
            if "experts" not in name and any(part in name for part in names)
        ]
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            weight.mul_(1.1)
        try:
            return generate(model)
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)

    assert compare(pair, ask) == 7


def test_what_changes_no_result_stays_native(pair):
    def ask(model):
        with put(model.config, "pad_token_id", 3):
            model.requires_grad_(False)
            found = generate(model, pad_token_id=None)
            model.requires_grad_(True)
        model.set_attn_implementation("eager")
        found += generate(model)
        model.set_attn_implementation("sdpa")
        return found

    assert compare(pair, ask) == 14
