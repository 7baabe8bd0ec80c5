"""Experts that are run one by one through their family's eager code sum up to what the whole module gives."""

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model, inputs
from moeflow.errors import UnsupportedModelError
from moeflow.hf import experts_interface
from moeflow.hf.eager.experts import run_expert

KINDS = ("mixtral", "gpt_oss", "aria", "muse_spark", "nemotron_h", "deepseek_v3", "deepseek_v4", "zaya")


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_experts_alone_sum_up_to_the_whole_module_bit_for_bit(name):
    torch.set_num_threads(1)
    model = build_model(FAMILIES[name])
    same = []

    def compare(module, args, kwargs, output):
        named = [*args, *kwargs.values()]
        hidden_states, index, weights = named
        total = torch.zeros_like(hidden_states)
        for expert in range(module.num_experts):
            ranks, tokens = torch.where((index == expert).T)
            if len(tokens):
                own = {name: value[expert] for name, value in module._parameters.items() if value is not None}
                total.index_add_(0, tokens, run_expert(module, own, hidden_states[tokens], weights[tokens, ranks]))
        same.append(torch.equal(total, output))

    for _, module in experts_interface.experts_modules(model):
        module.register_forward_hook(compare, with_kwargs=True)
    model(**inputs(FAMILIES[name]))
    assert same
    assert all(same)


def test_a_module_without_eager_code_is_refused():
    with pytest.raises(UnsupportedModelError, match="has no eager forward"):
        run_expert(torch.nn.Linear(2, 2), {}, torch.zeros(1, 2), torch.ones(1))
