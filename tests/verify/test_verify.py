"""A sound model equals its reference; whatever is wrong with an expert is found at its token, layer and expert."""

import copy
import threading
from itertools import chain

import pytest
import torch

from helpers.changed_models import save_changed
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.flipping_store import flipping
from moeflow.convert.pack import pack_model
from moeflow.convert.quantize import quantize_model
from moeflow.core import ExpertKey
from moeflow.errors import CheckpointError, ConfigError
from moeflow.hf import experts_interface
from moeflow.hf.eager.stored_weights import StoredWeights
from moeflow.hf.eager.weights import EagerWeights
from moeflow.hf.model_folder import ModelFolder
from moeflow.verify.bounds import output_bound
from moeflow.verify.compare import Comparison
from moeflow.verify.verify import load_for_passes, run_rows, verify

KINDS = ("gpt_oss", "aria", "ernie4_5_vl_moe", "muse_spark", "nemotron_h", "inkling", "deepseek_v4", "zaya")


def first_token(routes, layer, expert):
    """The first token that is routed to an expert."""
    return int((routes[layer] == expert).any(1).nonzero()[0, 0])


def test_a_sound_model_is_equal_in_every_layer(mixtral_folder, rows):
    found = verify(mixtral_folder, text=rows)
    assert found.equal
    assert found.first is None
    assert found.independent
    assert (found.num_tokens, len(found.layers), found.bound, found.dtype) == (48, 3, 1e-5, "float32")
    for layer in found.layers:
        assert 0 < layer.difference < 1e-6
        assert 0 < layer.decode_difference < 1e-6
        assert layer.layer_difference < 1e-6
        assert layer.experts == layer.num_experts == 8
        assert layer.rounding == 0
    assert str(found).startswith("equal: 48 tokens, 3 layers, bound 1e-05 (float32)")


@pytest.mark.parametrize("name", KINDS)
def test_a_family_is_equal(name, tmp_path):
    build_model(FAMILIES[name], dtype=torch.bfloat16).save_pretrained(tmp_path)
    found = verify(tmp_path, text=torch.randint(3, 60, (2, 12)).tolist())
    assert found.equal, str(found)
    assert found.bound < 0.03
    assert max(layer.difference for layer in found.layers) > 1e-4


def test_a_wrong_value_is_found_at_its_token_layer_and_expert(mixtral, mixtral_folder, rows, routes, tmp_path):
    def change(experts):
        experts[1].down_proj[3, 17, 40] += 1e-6  # far below what its output shows

    folder = save_changed(mixtral, tmp_path / "changed", change)
    found = verify(folder, reference=mixtral_folder, text=rows)
    (one,) = found.findings
    assert not found.equal
    token = first_token(routes, 1, 3)
    assert (one.token, one.layer, one.expert, one.what) == (token, 1, 3, "weights")
    assert one.token_id == list(chain(*rows))[token]
    assert one.path == "model.layers.1.mlp.experts"
    assert "down_proj" in one.detail
    assert "first at [17, 40]" in one.detail
    assert ".safetensors" in one.detail
    assert one.difference == pytest.approx(1e-6, rel=0.1)
    assert f"differs: token {token} (id {one.token_id}), layer 1" in str(found)


def test_two_swapped_experts_are_both_found(mixtral, mixtral_folder, rows, routes, tmp_path):
    def change(experts):
        for value in experts[2]._parameters.values():
            value[[1, 6]] = value[[6, 1]]

    folder = save_changed(mixtral, tmp_path / "swapped", change)
    found = verify(folder, reference=mixtral_folder, text=rows)
    assert {(one.layer, one.expert) for one in found.findings} == {(2, 1), (2, 6)}
    assert found.first.token == min(first_token(routes, 2, expert) for expert in (1, 6))
    assert found.layers[0].difference < 1e-6
    assert found.layers[1].difference < 1e-6 < 0.1 < found.layers[2].difference


@pytest.mark.parametrize("in_both", [False, True])
def test_a_nan_is_found(in_both, mixtral, mixtral_folder, rows, routes, tmp_path):
    def change(experts):
        experts[0].gate_up_proj[5, 2, 2] = float("nan")

    folder = save_changed(mixtral, tmp_path / "nan", change)
    found = verify(folder, reference=folder if in_both else mixtral_folder, text=rows)
    assert (found.first.token, found.first.layer, found.first.expert) == (first_token(routes, 0, 5), 0, 5)
    assert "is nan" in found.first.detail


def test_a_layer_with_a_wrong_scale_of_int4_is_found(mixtral, mixtral_folder, rows, tmp_path):
    sound = quantize_model(mixtral_folder, tmp_path / "sound", "int4-g32", method="rtn").folder
    found = verify(sound, reference=mixtral_folder, text=rows)
    assert found.equal
    assert 0.01 < max(layer.rounding for layer in found.layers) < 0.2

    def change(experts):
        experts[1].down_proj *= 1.5

    save_changed(mixtral, tmp_path / "scaled", change)
    scaled = quantize_model(tmp_path / "scaled", tmp_path / "int4", "int4-g32", method="rtn").folder
    found = verify(scaled, reference=mixtral_folder, text=rows)
    assert {one.layer for one in found.findings} == {1}
    assert {one.expert for one in found.findings} == set(range(8))
    assert found.first.difference == pytest.approx(0.5, abs=0.1)
    assert found.first.bound == 0.25
    assert "down_proj" in found.first.detail
    assert "int4-g32" in found.first.detail


def compare_with_store(folder, rows, store_class):
    """Compare while the threads that fill slots read from another store; the comparison itself reads what is right."""
    folder = ModelFolder(folder)
    model = load_for_passes(folder)
    with model.moeflow as runtime:
        runtime.store.__class__ = store_class
        own = StoredWeights(runtime.store, model.dtype, experts_interface.transposed(model))
        comparison = Comparison(model, own, EagerWeights(folder, model.dtype), list(chain(*rows)))
        run_rows(model, rows)
        comparison.close()
    return comparison


def test_a_slot_with_wrong_bytes_is_found_by_its_output(mixtral_folder, rows, routes):
    flips = {ExpertKey(1, 2): (4 * 100 + 3, 6)}  # the exponent of one value
    comparison = compare_with_store(mixtral_folder, rows, flipping(flips=flips))
    first = comparison.findings[0]
    assert (first.layer, first.expert, first.what) == (1, 2, "output")
    assert first.token == first_token(routes, 1, 2)
    assert {one.layer for one in comparison.findings} == {1}
    sound = compare_with_store(mixtral_folder, rows, flipping())
    assert comparison.layers[2] == sound.layers[2]  # which goes on from the reference


def test_a_sound_slot_is_not_found(mixtral_folder, rows):
    assert compare_with_store(mixtral_folder, rows, flipping()).findings == []


@pytest.mark.parametrize("lossless", [False, True])
def test_a_packed_folder_is_compared_with_what_it_was_written_from(lossless, mixtral, rows, tmp_path):
    copy.deepcopy(mixtral).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    packed = pack_model(tmp_path / "model", tmp_path / "packed", lossless=lossless).folder
    with pytest.raises(ConfigError, match=r"is packed.*Give --reference with the folder that it was written from"):
        verify(packed, text=rows)
    found = verify(packed, reference=tmp_path / "model", text=rows)
    assert found.equal
    assert found.independent
    assert found.dtype == "bfloat16"
    own = verify(packed, reference=packed, text=rows)
    assert own.equal
    assert not own.independent


def test_bits_do_not_depend_on_the_memory(mixtral_folder, rows):
    little, much = (verify(mixtral_folder, text=rows, expert_memory=share) for share in ("15%", "100%"))
    assert little.layers == much.layers


def test_a_reference_of_another_model_is_refused(mixtral, mixtral_folder, rows, tmp_path):
    build_model(FAMILIES["olmoe"]).save_pretrained(tmp_path)
    before = threading.enumerate()
    with pytest.raises(ConfigError, match="is of another model"):
        verify(mixtral_folder, reference=tmp_path, text=rows)
    after = set(threading.enumerate()) - set(before)
    assert not [thread for thread in after if thread.name.startswith("moeflow")]


def test_a_text_that_cannot_be_run_is_refused(mixtral_folder, speaking_folder):
    with pytest.raises(ConfigError, match="tokens is 0"):
        verify(speaking_folder, num_tokens=0)
    with pytest.raises(ConfigError, match="has no token"):
        verify(speaking_folder, text="")
    with pytest.raises(ConfigError, match="of one length"):
        verify(speaking_folder, text=[[1], [1, 2]])
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        verify(mixtral_folder, text="some text")


def test_bounds_grow_with_the_dtype_and_the_experts():
    assert output_bound(torch.float32, 8) == output_bound(torch.float64, 2) == 1e-5
    assert output_bound(torch.bfloat16, 4) == pytest.approx(6 / 256)
    assert output_bound(torch.float16, 4) == pytest.approx(6 / 2048)
