"""What a captured step depends on changes its digest; where and when the model was loaded does not."""

import subprocess
import sys

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral as family

from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow.hf.fingerprint import weights_fingerprint
from moeflow.hf.passes.step_digest import step_digest


@pytest.fixture
def model():
    return tiny_mixtral()


def another_scale(model):
    model.model.layers[1].self_attn.scaling *= 2


def another_config(model):
    model.config.rms_norm_eps = 1e-3


def another_weight(model):
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))


def another_dtype(model):
    model.to(torch.bfloat16)


def another_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def a_tied_weight(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def a_tensor_on_a_module(model):
    model.model.norm.table = torch.tensor([1.0])


def another_module(model):
    model.model.norm = torch.nn.Identity()


def a_patched_forward(model):
    model.model.norm.forward = lambda hidden: hidden * 2


@pytest.mark.parametrize(
    "change",
    [
        another_scale, another_config, another_weight, another_dtype, another_buffer, a_tied_weight,
        a_tensor_on_a_module, another_module, a_patched_forward,
    ],
)  # fmt: skip
def test_a_change_of_the_model_changes_it(model, change):
    before = step_digest(model)
    assert step_digest(model) == before
    change(model)
    assert step_digest(model) != before


@pytest.mark.parametrize("digest", [step_digest, weights_fingerprint])
def test_not_the_first_byte_of_blocks_alone_changes_it(model, digest):
    model.register_buffer("blocks", torch.zeros(1024, 8 * 144, dtype=torch.uint8))  # rows of 8 blocks of Q4_K
    found = {digest(model)}
    for place in (1, 2, 17):
        model.blocks.view(-1, 144)[:, place] = 1
        found.add(digest(model))
    assert len(found) == 4


def test_patched_code_of_the_family_changes_it(model, monkeypatch):
    before, digests = step_digest(model), set()
    monkeypatch.setattr(family.MixtralAttention, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    digests.add(step_digest(model))
    monkeypatch.undo()
    assert step_digest(model) == before
    for factor in (1.0, 2.0):  # the same code, and another value that it closes over
        monkeypatch.setattr(family, "rotate_half", lambda x, factor=factor: x * factor)
        digests.add(step_digest(model))
    assert len({before, *digests}) == 4


def test_the_path_and_a_run_do_not_change_it(model, tmp_path):
    before = step_digest(model)
    model.config._name_or_path = model.name_or_path = str(tmp_path)
    model(torch.tensor([[1, 2, 3]]))
    assert step_digest(model) == before


def test_what_torch_compile_leaves_in_the_family_does_not_change_it(model, monkeypatch):
    before = step_digest(model)
    monkeypatch.setattr(family, "__resume_at_30_1", lambda x: x + 1, raising=False)  # a name as torch.compile gives
    assert step_digest(model) == before


def test_it_is_the_same_in_every_process(model):
    program = """
from helpers.small_models import tiny_mixtral
from moeflow.hf.passes.step_digest import step_digest
print(step_digest(tiny_mixtral()))
"""
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
            env={"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.strip() == step_digest(model)
