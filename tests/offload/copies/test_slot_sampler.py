"""Slots are compared with their source: what differs is named, what moved is not judged; the output keeps its bits."""

import logging
import threading
from functools import partial

import pytest
import torch

from helpers.expert_runtimes import NUM_EXPERTS, NUM_LAYERS, build, each, fetch
from helpers.flipping_store import flipping
from moeflow import load_moe
from moeflow.convert.pack import pack_model
from moeflow.core import ExpertKey, Tier
from moeflow.errors import ConfigError
from moeflow.offload.copies.slot_sampler import SlotSampler
from moeflow.offload.copies.transfer import Transfer

FLIPPED = ExpertKey(1, 4)


def every_copy(*parts):
    return SlotSampler(*parts, share=1.0, bytes_per_s=1e12)


def sampled(runtime):
    """Let the comparison under way end; return what was found."""
    runtime._transfers.sampler.stop()
    return runtime.stats()["integrity"]


def fetch_each(runtime):
    """Demand one expert after the other, and wait for each comparison."""
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            list(each(runtime.fetch(layer, [expert])))
            sampled(runtime)


def test_a_sound_runtime_has_no_difference_and_looks_at_every_copy_drawn(experts_file):
    path, values = experts_file
    with build(path, 4, sampling=every_copy) as runtime:
        for _ in range(2):
            for layer in range(NUM_LAYERS):
                for expert in range(NUM_EXPERTS):
                    fetch(runtime, layer, [expert], values)
                    found = sampled(runtime)
        assert found["checked"] == 2 * NUM_LAYERS * NUM_EXPERTS
        assert found["differing"] == 0
        assert found["named"] == []
        assert found["checked_bytes"] == found["checked"] * 4032


def test_a_corrupt_slot_is_named_with_file_layer_expert_and_slot(experts_file, caplog):
    path, _ = experts_file
    store = flipping(flips={FLIPPED: (1234, 3)})
    with build(path, 18, sampling=every_copy, store_class=store) as runtime, caplog.at_level(logging.WARNING):
        fetch_each(runtime)
        found, slot = sampled(runtime), runtime.cache.slots[FLIPPED]
    expected = {"file": str(path), "layer": 1, "path": "layers.1", "expert": 4, "slot": slot}
    assert found["differing"] == 1
    assert found["named"] == [expected]
    (record,) = caplog.records
    for word in (str(path), "MoE layer 1", "expert 4", f"slot {slot}"):
        assert word in record.getMessage()


@pytest.mark.parametrize("packed", [False, True])
def test_a_corrupt_slot_of_a_loaded_model_is_named(packed, mixtral_folder, tmp_path):
    folder = pack_model(mixtral_folder, tmp_path / "packed").folder if packed else mixtral_folder
    model = load_moe(folder, expert_memory="100%", predictor=None, integrity="sample")
    with model.moeflow as runtime:
        runtime.store.__class__ = flipping(flips={FLIPPED: (4321, 0)})
        sampler = runtime._transfers.sampler
        sampler._share, sampler._bytes_per_s = 1.0, 1e12
        for expert in range(8):
            list(runtime.fetch(1, [expert]))
            found = sampled(runtime)
    assert found["checked"] == 8
    assert [(one["layer"], one["expert"]) for one in found["named"]] == [(1, 4)]


def test_the_output_has_the_same_bits(mixtral_folder):
    tokens = torch.randint(0, 128, (2, 20), generator=torch.Generator().manual_seed(3))
    outputs = []
    for integrity in ("off", "sample"):
        with load_moe(mixtral_folder, expert_memory="30%", integrity=integrity).moeflow as runtime:
            assert (runtime.stats()["integrity"] is None) == (integrity == "off")
        model = load_moe(mixtral_folder, expert_memory="30%", integrity=integrity)
        if integrity == "sample":
            model.moeflow._transfers.sampler._share = 1.0
        with torch.no_grad(), model.moeflow as runtime:
            outputs.append(torch.cat([model(tokens).logits for _ in range(3)]))
            counted = runtime.stats()["prefill"]
        outputs.append(torch.tensor([counted["hits"], counted["misses"], counted["evictions"]]))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])  # no expert stays longer, none goes earlier


def test_an_expert_that_moved_meanwhile_is_not_judged(experts_file):
    path, values = experts_file
    with build(path, 4, sampling=every_copy) as runtime:
        fetch(runtime, 0, [0], values)
        sampled(runtime)
        sampler, slot = runtime._transfers.sampler, runtime.cache.slots[ExpertKey(0, 0)]
        sampler._pool.bytes[slot][:8] = 0
        written, gone = (Transfer(ExpertKey(0, e), slot, Tier.DISK, None, prefetch=False) for e in (0, 1))
        sampler.copied(gone)  # its slot holds another expert
        found = sampled(runtime)
        assert (found["checked"], found["passed_over"], found["differing"]) == (1, 1, 0)
        sampler.copied(written)
        assert sampled(runtime)["differing"] == 1


def test_what_is_looked_at_is_drawn_with_a_seed_and_bounded_by_bytes(experts_file):
    path, values = experts_file

    def looked_at(share, bytes_per_s):
        sampling = partial(SlotSampler, share=share, bytes_per_s=bytes_per_s)
        with build(path, 4, sampling=sampling) as runtime:
            seen = []
            for layer in range(NUM_LAYERS):
                for expert in range(NUM_EXPERTS):
                    fetch(runtime, layer, [expert], values)
                    seen.append(sampled(runtime)["checked"])
            return seen

    some = looked_at(0.3, 1e12)
    assert 0 < some[-1] < NUM_LAYERS * NUM_EXPERTS
    assert looked_at(0.3, 1e12) == some
    assert looked_at(1.0, 1e-3)[-1] == 0  # not enough for one expert for weeks


def test_a_closed_runtime_leaves_no_thread(experts_file):
    path, values = experts_file
    with build(path, 4, sampling=every_copy) as runtime:
        fetch(runtime, 0, [0], values)
        assert any(thread.name == "moeflow-integrity" for thread in threading.enumerate())
    assert not any(thread.name == "moeflow-integrity" for thread in threading.enumerate())


def test_an_unknown_mode_is_refused(mixtral_folder):
    with pytest.raises(ConfigError, match="integrity='always' is unknown"):
        load_moe(mixtral_folder, integrity="always")
