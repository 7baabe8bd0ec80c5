"""Decode steps that trust that nothing is missed: the same bits, run again where they were wrong, counted once."""

import json
import os
import subprocess
import sys

import pytest
import torch

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
        runtime._governor = Scripted()
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
