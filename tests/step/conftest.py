"""One small model as transformers loads it and with native steps, for the tests of this folder."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.native_steps import Pair, generate
from moeflow import load_moe


@pytest.fixture(scope="session")
def shared_pair(mixtral_folder):
    torch.set_num_threads(1)
    eager = AutoModelForCausalLM.from_pretrained(mixtral_folder, experts_implementation="eager").eval()
    native = load_moe(mixtral_folder, device="cpu", expert_memory="100%", predictor=None, step="auto")
    first = generate(native)
    with native.moeflow:
        yield Pair(eager, native), first


@pytest.fixture
def pair(shared_pair):
    """The models; a test that changes them undoes it, and the native one answers afterwards as it did before."""
    models, first = shared_pair
    yield models
    before = models.native.moeflow.step.num_steps
    tokens, logits = generate(models.native)
    assert torch.equal(tokens, first[0])
    assert torch.equal(logits, first[1])
    assert models.native.moeflow.step.num_steps == before + len(logits) - 1
    models.native.moeflow.check_integrity()
