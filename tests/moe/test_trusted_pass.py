"""Decode steps that trust that nothing is missed: the same bits, repeated where they were wrong, counted once."""

import json
import os
import subprocess
import sys

import pytest

_RUN = """
import json, sys
import torch
from transformers.cache_utils import DynamicCache
from moeflow import load_moe
from moeflow.kernels.activations import recognise
from moeflow.moe.triton_compute import TritonCompute
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.trusting import Trusting
from moeflow.policy.trust import Trust

class Always(Trust):
    pays = True

folder, budget, mode = sys.argv[1:4]
torch.set_num_threads(1)
model = load_moe(folder, expert_memory=budget, dtype=torch.float32, predictor=None, step="python")
runtime = model.moeflow
if mode != "asking":
    slots = runtime._residency.pool.tensor
    runtime.trusting = Trusting(DeviceTable(runtime.cache, slots, runtime.experts_per_layer), runtime._stats)
    if mode == "always":
        runtime.trusting.trust = Always()
for layer in model.model.layers:
    module = layer.mlp.experts
    compute = TritonCompute(recognise(module._apply_gate, True), False)
    assert compute.can_run(runtime.records(module._moeflow.layer))
    module._moeflow._computes[torch.float32] = compute
logits = []
with torch.no_grad():
    model(torch.arange(1, 41)[None])  # every expert has come
with torch.no_grad():
    for rows, passes in ((1, 12), (3, 4)):
        cache = DynamicCache(config=model.config)
        ids = torch.arange(1, 1 + 4 * rows).view(rows, 4)
        for _ in range(passes):
            out = model(ids, past_key_values=cache)
            ids = out.logits[:, -1:].argmax(-1)
            logits.append(out.logits[:, -1])
runtime.check_integrity()
stats = runtime.stats()["decode"]
trust = runtime.trusting and runtime.trusting.trust.steps
model.moeflow.close()
print(json.dumps({
    "logits": torch.cat(logits).view(torch.int32).flatten().tolist(),
    "trust": trust and list(trust.values()),
    "forwards": stats["forwards"], "demands": stats["hits"] + stats["misses"], "hits": stats["hits"],
}))
"""


def _run(folder, budget, mode):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, str(folder), budget, mode],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def asking(mixtral_folder):
    return _run(mixtral_folder, "100%", "asking")


@pytest.mark.slow
def test_steps_are_trusted_once_nothing_is_missed_and_have_the_same_bits(mixtral_folder, asking):
    found = _run(mixtral_folder, "100%", "trusting")
    right, wrong = found["trust"]
    assert found["logits"] == asking["logits"]
    assert (right > 0, wrong) == (True, 0)
    assert {name: found[name] for name in ("forwards", "demands", "hits")} == {
        name: asking[name] for name in ("forwards", "demands", "hits")
    }


@pytest.mark.slow
def test_a_step_that_missed_an_expert_is_run_again_with_the_same_bits(mixtral_folder, asking):
    found = _run(mixtral_folder, "60%", "always")
    right, wrong = found["trust"]
    assert found["logits"] == asking["logits"]
    assert right + wrong == 14
    assert wrong > 0
    assert (found["forwards"], found["demands"]) == (asking["forwards"], asking["demands"])
    assert found["hits"] < found["demands"]
