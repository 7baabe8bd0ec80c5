"""Generations whose decode steps are captured, beside those that ask: under Triton's interpreter, on the CPU.

Run as a script: it prints a JSON object of what it found. CUDA graphs are stood in for by recorded operations.
"""

import gc
import json
import os
import tempfile

os.environ |= {"TRITON_INTERPRET": "1", "MOEFLOW_CPU_KERNELS": "off"}  # as on a GPU: every kernel is one of torch's

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from helpers.recorded_capture import RecordedCapture
from moeflow import load_moe
from moeflow.hf.passes.caches.step_cache import StepLayer
from moeflow.kernels.activations import recognise
from moeflow.loading.attach import capture_steps
from moeflow.moe.triton_compute import TritonCompute
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.trusting import Trusting
from moeflow.policy.trust import Trust

PROMPT = torch.tensor([[5, 9]])
TWO = {"inputs": torch.tensor([[5, 9], [7, 7]]), "attention_mask": torch.tensor([[1, 1], [0, 1]])}


def save_model(folder):
    """Save a Qwen3-MoE of 2 layers x 6 experts, of which a token takes 2."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=6, num_experts_per_tok=2, vocab_size=48,
        initializer_range=0.3, eos_token_id=None, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).eval().save_pretrained(folder)


class Model:
    """A loaded model, as on a GPU.

    Args:
        folder: of its checkpoint.
        memory: for its experts.
        trusts: whether every step is trusted; none otherwise.
        in_pieces: whether steps that ask are captured in pieces.
        predictor: of the experts needed next.
    """

    def __init__(self, folder, memory, trusts, in_pieces=True, predictor=None):
        self.model = load_moe(folder, expert_memory=memory, dtype=torch.float32, predictor=predictor, step="python")
        self.runtime, self.capture, self.num_runs, self.signals = self.model.moeflow, RecordedCapture(), 0, []
        pool = self.runtime._residency.pool
        table = DeviceTable(self.runtime.cache, pool, self.runtime.experts_per_layer)
        self.runtime.trusting = Trusting(table, self.runtime._stats)
        self.runtime.trusting.trust = type("Fixed", (Trust,), {"pays": trusts})()
        for layer in self.model.model.layers:
            module = layer.mlp.experts
            compute = TritonCompute(recognise(module._apply_gate, True), False)
            assert compute.can_run(self.runtime.records(module._moeflow.layer))
            module._moeflow._computes[torch.float32] = compute
        capture_steps(self.model, self.runtime, self.capture)
        if not in_pieces:
            self.runtime.trusting.pieces = None
        if predictor is not None:
            self._note_signals(self.runtime.prediction)
        first = self.model.model.layers[0].mlp.gate
        own = first.forward

        def counted(*args):
            self.num_runs += 1
            return own(*args)

        first.forward = counted

    def _note_signals(self, prediction):
        own = prediction.signal

        def signal(layer, hidden):
            made = own(layer, hidden)
            bits = None if made is None else made.float().view(torch.int32).flatten().tolist()
            self.signals.append((layer, bits))
            return made

        prediction.signal = signal

    def generate(self, inputs=PROMPT, num_tokens=5, **options):
        """Return the bits of all logits of a generation, whose tokens are drawn by them."""
        torch.manual_seed(1)
        made = self.model.generate(
            inputs, max_new_tokens=num_tokens, do_sample=True, output_logits=True, return_dict_in_generate=True,
            **options,
        )  # fmt: skip
        return [one.view(torch.int32).flatten().tolist() for one in made.logits]

    def counts(self):
        """Return what the runtime says of its steps, and how often Python of the model ran."""
        stats = self.runtime.stats()
        decode = stats["decode"]
        demands = {"forwards": decode["forwards"], "demands": decode["hits"] + decode["misses"]}
        predicted = None if stats["prediction"] is None else stats["prediction"]["prefetch"]["issued"]
        return {**stats["step"], **demands, "misses": decode["misses"], "runs": self.num_runs, "prefetches": predicted}

    def close(self):
        """Close it; return how many captured steps are still held."""
        self.runtime.check_integrity()
        self.model.moeflow.close()
        gc.collect()
        return len(self.capture.held)


def frozen_update(self, keys, values, *args, **kwargs):
    """Keep new keys and values at a position that the host knows, as no captured step may."""
    if self.place.position is None:
        return own_update(self, keys, values, *args, **kwargs)
    for memory, new in zip(self.memory, (keys, values), strict=True):
        memory[:, :, self.length : self.length + 1] = new
    return self.memory


own_update = StepLayer.update


def waiting(model):
    """Let a model's router wait for the device, without a change of values."""
    router = model.model.model.layers[1].mlp.gate
    own = router.forward
    router.forward = lambda hidden: own(hidden * (1 if bool(hidden.sum() > -torch.inf) else 0))


def main(folder):
    """Return what was found."""
    save_model(folder)
    found = {}
    asking = Model(folder, "100%", trusts=False, in_pieces=False)
    want = {"one": asking.generate(), "two": asking.generate(**TWO, num_tokens=3)}
    found["asking"] = asking.counts()
    found["asking held"] = asking.close()
    captured = Model(folder, "100%", trusts=True)
    found["one"] = captured.generate() == want["one"]
    found["one counts"] = captured.counts()
    found["two"] = captured.generate(**TWO, num_tokens=3) == want["two"]
    found["captured"] = captured.counts()
    gc.collect()
    found["held behind a generation"] = len(captured.capture.held)
    StepLayer.update = frozen_update
    found["frozen"] = captured.generate(num_tokens=3) == want["one"][:3]
    StepLayer.update = own_update
    handle = captured.model.model.layers[0].register_forward_hook(lambda *_: None)
    found["hooked"] = captured.generate(num_tokens=2) == want["one"][:2]
    found["hooked reason"] = captured.counts()["not_replayed"]
    handle.remove()
    waiting(captured)
    found["waiting"] = captured.generate(num_tokens=3) == want["one"][:3]
    found["waiting reason"] = captured.counts()["not_replayed"]
    found["closed held"] = captured.close()
    small = Model(folder, "40%", trusts=True)
    found["small"] = small.generate() == want["one"]
    found["small counts"] = small.counts()
    small.close()
    return found | in_pieces(folder, want)


def in_pieces(folder, want):
    """Return what was found of steps in pieces, where experts are missed."""
    found = {}
    missing = Model(folder, "30%", trusts=False)
    found["missing"] = missing.generate() == want["one"] and missing.generate(**TWO, num_tokens=3) == want["two"]
    found["missing counts"] = missing.counts()
    gc.collect()
    found["pieces held behind a generation"] = len(missing.capture.held)
    StepLayer.update = frozen_update
    found["frozen pieces"] = missing.generate(num_tokens=3) == want["one"][:3]
    StepLayer.update = own_update
    handle = missing.model.model.layers[0].register_forward_hook(lambda *_: None)
    found["hooked pieces"] = missing.generate(num_tokens=2) == want["one"][:2]
    found["hooked pieces reason"] = missing.counts()["pieces"]["not_replayed"]
    handle.remove()
    missing.runtime.observers.append(seen := Seen())
    found["observed"] = missing.generate(num_tokens=3) == want["one"][:3]
    found["observed counts"], found["observed layers"] = missing.counts(), seen.layers
    missing.runtime.observers.clear()
    missing.model.generate(PROMPT, max_new_tokens=2, num_beams=2)
    found["beams reason"] = missing.counts()["pieces"]["not_replayed"]
    waiting(missing)
    found["waiting pieces"] = missing.generate(num_tokens=3) == want["one"][:3]
    found["waiting pieces reason"] = missing.counts()["pieces"]["not_replayed"]
    found["pieces closed held"] = missing.close()
    for way in (False, True):
        predicted = Model(folder, "30%", trusts=False, in_pieces=way, predictor="auto")
        name = "predicted in pieces" if way else "predicted"
        found[name] = predicted.generate() == want["one"]
        found[f"{name} counts"], found[f"{name} signals"] = predicted.counts(), predicted.signals[:]
        kept = predicted.model.generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True)
        found["held with a cache"] = len(predicted.capture.held)
        found["held after close"] = predicted.close()
        del kept  # whose cache has been alive
    return found


class Seen:
    """Notes the layers of passes."""

    def __init__(self):
        self.layers = []

    def begin_pass(self, begun):
        self.layers.append([])

    def observe(self, layer, top_k_index, top_k_weights, hidden_states):
        self.layers[-1].append(layer)

    def close(self):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(folder)))
