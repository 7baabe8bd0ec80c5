"""Decode steps that trust that nothing is missed: the same bits, run again where they were wrong, counted once."""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.hf.passes.residual import ResidualTap
from moeflow.moe.trusted_pass import Hooks

_RUN = """
import json, sys
import torch
from transformers.cache_utils import DynamicCache
from moeflow import load_moe
from moeflow.kernels.activations import recognise
from moeflow.loading import tiers
from moeflow.moe.triton_compute import TritonCompute
from moeflow.offload.arena.segmented_pool import SegmentedPool
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.trusting import Trusting
from moeflow.policy.trust import Trust

class Always(Trust):
    pays = True

class OnCpu(SegmentedPool):
    def _allocate(self):
        base = super()._allocate()
        pool = self
        class Bytes:
            def __getitem__(self, slot):
                return pool.record(slot, pool.stride).numpy()
        self.bytes = Bytes()
        return base

class Scripted:
    def __init__(self):
        self.limits = iter((24, 8, 8, 24))
    def slots(self, used, limit, now):
        return next(self.limits)
    def stats(self):
        return {}

torch.set_num_threads(1)
found, whole = {}, tiers._slots
for way in ("asks", "trusts", "in segments"):
    trusts = way != "asks"
    if way == "in segments":
        tiers._slots = lambda size, options, num_slots: OnCpu(
            num_slots, size.slot_bytes, options.torch_device, segment_bytes=4 * size.slot_bytes
        )
    model = load_moe(sys.argv[1], expert_memory="100%", dtype=torch.float32, predictor=None, step="python")
    runtime = model.moeflow
    if trusts:
        pool = runtime._residency.pool
        runtime.trusting = Trusting(DeviceTable(runtime.cache, pool, runtime.experts_per_layer), runtime._stats)
        runtime.trusting.trust = Always()
    for layer in model.model.layers:
        module = layer.mlp.experts
        compute = TritonCompute(recognise(module._apply_gate, True), False)
        assert compute.can_run(runtime.records(module._moeflow.layer))
        module._moeflow._computes[torch.float32] = compute
    if way == "in segments":
        runtime.governor = Scripted()
    logits, open_slots = [], []
    with torch.no_grad():
        for rows, passes in ((1, 4),) if way == "in segments" else ((1, 5), (2, 2)):
            cache = DynamicCache(config=model.config)
            ids = torch.arange(1, 1 + 2 * rows).view(rows, 2)
            for _ in range(passes):
                output = model(ids, past_key_values=cache)
                ids = torch.full((rows, 1), 5)  # whose experts are often the same
                open_slots += [getattr(runtime._residency.pool, "num_open", None)]
                logits += output.logits[:, -1].view(torch.int32).flatten().tolist()
    runtime.check_integrity()
    stats = runtime.stats()["decode"]
    counts = {"forwards": stats["forwards"], "demands": stats["hits"] + stats["misses"]}
    found[way] = {"logits": logits, "counts": counts}
    if way == "in segments":
        found["slots"] = open_slots
    elif trusts:
        found["steps"] = list(runtime.trusting.trust.steps.values())
        found["hits"] = stats["hits"]
    model.moeflow.close()
print(json.dumps(found))
"""


def test_hooks_are_found_when_they_come_and_when_they_go():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    hooks = Hooks(model)
    assert not hooks.are_there()
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model[1][0], register)(lambda *_: None)
        assert hooks.are_there()
        handle.remove()
        assert not hooks.are_there()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert hooks.are_there()
    handle.remove()
    model[0] = torch.nn.Linear(2, 2)
    model[0].register_forward_hook(lambda *_: None)
    assert any(hooks.are_there() for _ in range(70))


def test_hooks_of_prediction_s_own_tap_may_be_left_out_and_no_others():
    model = tiny_mixtral(num_hidden_layers=1)
    hooks, own, other = Hooks(model), ResidualTap(model), ResidualTap(model)
    own.listen(True)
    assert hooks.are_there()
    assert not hooks.are_there(own.owns)
    other.listen(True)
    assert hooks.are_there(own.owns)


@pytest.mark.slow
def test_steps_that_trust_have_the_same_bits_though_experts_are_missed_and_their_memory_is_given_back(mixtral_folder):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, str(mixtral_folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trusts"] == found["asks"]
    logits = found["in segments"]["logits"]
    assert logits == found["asks"]["logits"][: len(logits)]
    assert found["slots"] == [24, 8, 8, 24]
    right, wrong = found["steps"]
    assert right + wrong == 5
    assert right > 0
    assert wrong > 0
    assert found["hits"] < found["trusts"]["counts"]["demands"]


@pytest.fixture(scope="module")
def captured():
    """What `helpers/captured_runs.py` found."""
    pytest.importorskip("triton")
    script, path = ROOT / "tests/helpers/captured_runs.py", os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_captured_steps_have_the_bits_of_steps_that_ask(captured):
    assert captured["one"]
    assert captured["two"]
    assert captured["small"]
    assert captured["asking"]["captured"] == 0
    for found in (captured["one counts"], captured["captured"], captured["small counts"]):
        assert found["mode"] == "trusting"
        assert found["not_replayed"] is None
        assert found["replayed"] == found["steps"] + found["repeated"]
        assert found["steps"] > 0
        assert found["repeated"] > 0
    same = ("forwards", "demands")
    assert [captured["captured"][name] for name in same] == [captured["asking"][name] for name in same]


@pytest.mark.slow
def test_a_captured_step_runs_no_python_of_the_model_even_where_it_missed_an_expert(captured):
    counts = captured["captured"]
    assert counts["captured"] == 2  # a generation each, of one sequence and of two
    assert counts["pieces"]["replayed"] == counts["repeated"]
    assert counts["runs"] == 2 + 2 * (counts["captured"] + counts["pieces"]["captured"])  # prefills; warm-up, recording


@pytest.mark.slow
def test_an_input_that_is_frozen_as_a_step_is_captured_shows(captured):
    assert not captured["frozen"]


@pytest.mark.slow
def test_steps_that_cannot_be_captured_run_as_they_are_and_the_reason_is_told(captured):
    assert captured["hooked"]
    assert captured["hooked reason"] == "the model has hooks"
    assert captured["waiting"]
    assert "operation not permitted when stream is capturing" in captured["waiting reason"]


@pytest.mark.slow
def test_captured_steps_are_given_back_behind_each_generation_and_at_close(captured):
    assert captured["asking held"] == captured["held behind a generation"] == captured["closed held"] == 0
    assert captured["pieces held behind a generation"] == captured["pieces closed held"] == 0
    assert captured["held with a cache"] == 3  # pieces of one step
    assert captured["held after close"] == 0


@pytest.mark.slow
def test_steps_that_miss_experts_are_replayed_in_pieces_with_the_bits_of_steps_that_ask(captured):
    assert captured["missing"]
    counts, pieces = captured["missing counts"], captured["missing counts"]["pieces"]
    assert counts["misses"] > counts["demands"] / 2
    assert (pieces["replayed"], pieces["not_replayed"]) == (counts["forwards"], None)
    assert counts["runs"] == 2 + 2 * pieces["captured"]  # prefills; warm-up and recording
    assert pieces["captured"] == 2
    assert (counts["forwards"], counts["demands"]) == (captured["asking"]["forwards"], captured["asking"]["demands"])
    assert not captured["frozen pieces"]


@pytest.mark.slow
def test_predicted_steps_in_pieces_show_the_predictor_what_its_hooks_saw(captured):
    assert captured["predicted"]
    assert captured["predicted in pieces"]
    counts = captured["predicted in pieces counts"]
    assert counts["pieces"]["replayed"] == counts["forwards"] == 4
    assert counts["runs"] == 1 + 2
    assert counts["prefetches"] > 0
    assert captured["predicted in pieces signals"] == captured["predicted signals"]
    assert all(bits is not None for _, bits in captured["predicted signals"])


@pytest.mark.slow
def test_observed_steps_are_replayed_in_pieces(captured):
    assert captured["observed"]
    assert captured["observed counts"]["pieces"]["not_replayed"] is None
    assert captured["observed layers"] == [[0, 1]] * 3


@pytest.mark.slow
def test_steps_that_are_not_replayed_in_pieces_tell_the_reason(captured):
    assert captured["hooked pieces"]
    assert captured["hooked pieces reason"] == "the model has hooks"
    assert "DynamicCache" in captured["beams reason"]
    assert captured["waiting pieces"]
    assert "operation not permitted when stream is capturing" in captured["waiting pieces reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_have_the_same_bits_at_every_budget(mixtral_folder):
    found = []
    for memory in ("100%", "30%"):
        model = load_moe(mixtral_folder, device="cuda", expert_memory=memory, predictor=None, cuda_graphs=True)
        with model.moeflow:
            for _ in range(2):
                made = model.generate(
                    torch.tensor([[1, 2]], device="cuda"), max_new_tokens=40, do_sample=False, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
            found.append(torch.stack(made.logits).cpu())
            step = model.moeflow.stats()["step"]
            assert (step["pieces"] if memory == "30%" else step)["replayed"] > 0, step
    assert torch.equal(found[0], found[1])
