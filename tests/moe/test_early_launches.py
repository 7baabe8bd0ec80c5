"""Layers that are launched before the host knows their routes: the same bits with any predictor, right and missed."""

import json
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

_RUN = """
import collections, json, sys
import torch
from transformers.cache_utils import DynamicCache
from helpers.split_experts import larger_blocks
from moeflow import load_moe
from moeflow.kernels.activations import recognise
from moeflow.moe import experts
from moeflow.moe.triton_compute import TritonCompute
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.trusting import Trusting
from moeflow.policy.trust import Trust

class Never(Trust):
    pays = False

larger_blocks()
torch.set_num_threads(1)
seen = collections.Counter()

def counted(name):
    function = getattr(experts, name)
    def call(*args, **options):
        made = function(*args, **options)
        output = getattr(made, "output", None)
        seen[name if name == "routes_on_host" else "wrong" if output is None else "right"] += 1
        return made
    setattr(experts, name, call)

counted("launch_early")
counted("routes_on_host")
for name in sys.argv[3:]:
    predictor = None if name in ("asking", "none") else name
    model = load_moe(sys.argv[1], expert_memory=sys.argv[2], dtype=torch.float32, predictor=predictor, step="python")
    runtime = model.moeflow
    if name != "asking":
        pool = runtime._residency.pool
        runtime.trusting = Trusting(DeviceTable(runtime.cache, pool, runtime.experts_per_layer), runtime._stats)
        runtime.trusting.trust = Never()
    if predictor is not None:
        runtime.prediction.prefetcher._min_probability = 0.01
        runtime.prediction._switch.step = lambda *_: True
    for layer in model.model.layers:
        module = layer.mlp.experts
        compute = TritonCompute(recognise(module._apply_gate, True), False)
        assert compute.can_run(runtime.records(module._moeflow.layer))
        module._moeflow._computes[torch.float32] = compute
    seen.clear()
    logits = []
    with torch.no_grad():
        for rows, passes in ((1, 4), (2, 2)):
            cache = DynamicCache(config=model.config)
            ids = torch.arange(1, 1 + 2 * rows).view(rows, 2)
            for _ in range(passes):
                output = model(ids, past_key_values=cache)
                ids = torch.full((rows, 1), 5)  # whose experts are often the same
                logits += output.logits[:, -1].view(torch.int32).flatten().tolist()
    runtime.check_integrity()
    stats = runtime.stats()
    prediction = stats["prediction"]
    print(json.dumps({
        "name": name, "logits": logits, "layers": dict(seen),
        "demands": [stats[phase]["hits"] + stats[phase]["misses"] for phase in ("prefill", "decode")],
        "hits": stats["decode"]["hits"],
        "failure": prediction and prediction["failure"], "issued": prediction and prediction["prefetch"]["issued"],
    }))
    model.moeflow.close()
"""


@pytest.mark.slow
def test_layers_launched_early_have_the_same_bits_with_any_predictor(mixtral_folder):
    pytest.importorskip("triton")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, str(mixtral_folder), "40%", "asking", "none", "auto", "markov"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    asking, *early = map(json.loads, done.stdout.splitlines())
    assert set(asking["layers"]) == {"routes_on_host"}
    for found in early:
        assert found["logits"] == asking["logits"], found["name"]
        assert found["demands"] == asking["demands"]
        assert found["layers"]["right"] > 0
        assert found["layers"]["wrong"] > 0
        assert "routes_on_host" not in found["layers"]
        assert found["failure"] is None
        assert found["hits"] > 0
        assert found["name"] == "none" or found["issued"] > 0  # prefetches that arrive while steps run
