"""Changes between a GGUF file and a model: which way each goes, as llama.cpp's files were found to have it."""

from types import SimpleNamespace

import pytest
import torch

from helpers.family_models import build_model
from helpers.gguf_families import ReadBack, byte_tokenizer, gguf_families
from moeflow.convert.gguf import write_gguf
from moeflow.hf.gguf.architecture import Same
from moeflow.hf.gguf.changes import Joined, LogNegate, PermuteForRope, PlusOne, RowsOf, Squeeze

CONFIG = SimpleNamespace(heads=2, parts=[1, 3])


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
def test_halves_become_pairs_in_each_head(shape):
    rows = torch.arange(12.0).reshape(12, *(1 for _ in shape[1:])).expand(shape)
    change = PermuteForRope(lambda config: config.heads)
    (written,) = change.write(rows, CONFIG)
    assert written.reshape(12, -1)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(change.read([written], CONFIG), rows)


@pytest.mark.parametrize(
    ("change", "parameter", "written"),
    [
        (PlusOne(), [0.5, -1.0], [[1.5, 0.0]]),
        (LogNegate(), [0.0], [[-1.0]]),
        (Squeeze(0, 2), [[1.0, 2.0]], [[1.0, 2.0]]),
        (Joined(lambda config: config.parts), [1.0, 2.0, 3.0, 4.0], [[1.0], [2.0, 3.0, 4.0]]),
    ],
)
def test_a_change_is_undone(change, parameter, written):
    found = change.write(torch.tensor(parameter), CONFIG)
    assert [tensor.tolist() for tensor in found] == written
    assert change.read(found, CONFIG).tolist() == parameter


def test_a_dimension_that_a_file_holds_is_left():
    assert Squeeze(0, 2).read([torch.ones(1, 3)], CONFIG).shape == (1, 3)


def test_rows_of_a_joined_tensor_are_changed_by_themselves():
    change = RowsOf(1, lambda config: [2, 6], PermuteForRope(lambda config: 1))
    assert change.read([torch.arange(8.0)], CONFIG).tolist() == [2, 4, 6, 3, 5, 7]
    assert change.moves_rows
    assert RowsOf(0, lambda config: [4, 4], Same()).read([torch.arange(8.0)], CONFIG).tolist() == [0, 1, 2, 3]


def test_rows_of_gate_and_up_of_gpt_oss_take_turns_in_the_model_alone(tmp_path):
    model = build_model(gguf_families()["gpt-oss"])
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    tensors, experts = ReadBack(tmp_path / "model.gguf").tensors, model.model.layers[1].mlp.experts
    for place, name in enumerate(("gate", "up")):
        weight, bias = (tensors[f"blk.1.ffn_{name}_exps.{kind}"] for kind in ("weight", "bias"))
        assert torch.equal(weight, experts.gate_up_proj[:, :, place::2].transpose(1, 2))
        assert torch.equal(bias, experts.gate_up_proj_bias[:, place::2])
