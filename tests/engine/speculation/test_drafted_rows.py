"""The tokens of a draft are rows that share a slot: their logits are those of single steps, bit for bit."""

import pytest
import torch

from helpers.engine_requests import tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_models import tiny_mixtral
from helpers.window_models import windowed_model
from moeflow import load_moe
from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.sequence import Piece
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
DRAFT = tokens(7, 9)
LATENT, SINKS = "deepseek_v2", "gpt_oss"


class One:
    """A sequence that a runner computes pass by pass, whatever it says."""

    def __init__(self, model, prompt, **options):
        self.runner = ModelRunner(model, 1 << 26, **options)
        self.sequence = self.runner.sequence("one", prompt, 300)
        assert self.runner.memory.admit(self.sequence)
        self.run(prompt)

    def run(self, new, draft=()):
        """Compute tokens and a draft behind them, as much of it as there is room for; logits [1 + draft, V]."""
        assert self.runner.memory.grow(self.sequence)
        draft = draft[: self.runner.room_behind(self.sequence)]
        (computed,) = self.runner.run([Piece(self.sequence, list(new), True, tuple(draft))])
        assert computed.error is None, computed.error
        self.sequence.num_computed += len(new)
        return computed.logits

    def say(self, token):
        self.sequence.append(token)
        return self.run([token])


def loaded(model, folder, **options):
    model.save_pretrained(folder)
    return load_moe(folder, **{"expert_memory": "100%", "predictor": None, "step": "auto", "device": "cpu", **options})


def made(kind, dtype):
    if kind == "mixtral":
        return tiny_mixtral().to(dtype)
    if kind == "windows":
        return windowed_model().to(dtype)
    return build_model(FAMILIES[kind], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "windows", LATENT, SINKS])
def test_rows_of_a_draft_have_the_bits_of_single_steps(kind, dtype, tmp_path):
    model = loaded(made(kind, dtype), tmp_path / "model", dtype=dtype)
    with model.moeflow:
        drafted, single = (One(model, tokens(21, 1)) for _ in range(2))
        for token in tokens(50, 2):  # past the window, and every draft is wrong
            drafted.sequence.append(token)
            found = drafted.run([token], DRAFT)
            assert drafted.runner.was_native
            assert torch.equal(found[:1], single.say(token))
        assert len(found) == 1 + len(DRAFT)
        expected = torch.cat([single.say(token) for token in DRAFT])
        assert torch.equal(found[1:], expected)
