"""No memory for an instruction of a step is an error of Python's, and the same step runs when there is some again."""

import resource
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow.kernels.cpu.library import instruction_set

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built"),
    pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="no such limit here"),
]
PROGRAM = """
import ctypes, resource, sys, torch
from moeflow import load_moe

C = ctypes.CDLL(None)
C.malloc.restype, C.malloc.argtypes, C.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

class Limit:
    "Takes the process's memory away behind the first new token: what is left is too little for a step's attention."
    def __init__(self):
        self.calls, self.taken = 0, []
    def put(self, value):
        self.calls += 1
        if self.calls == 2:
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
            while block := C.malloc(1 << 17):
                self.taken.append(block)
    def end(self):
        pass
    def give_back(self):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for block in self.taken:
            C.free(block)

model = load_moe(sys.argv[1], device="cpu", expert_memory="100%", predictor=None)
model.moeflow.step.prepare()
prompt = 1 + torch.arange(1100)[None] % 120
arguments = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
with model.moeflow:
    limit, num_steps = Limit(), model.moeflow.step.num_steps
    try:
        model.generate(prompt, streamer=limit, **arguments)
    except MemoryError as error:
        print(error)
    limit.give_back()
    assert model.moeflow.step.num_steps == num_steps
    assert model.generate(prompt, **arguments).shape == (1, 1103)
    assert model.moeflow.step.num_steps == num_steps + 2
    model.moeflow.check_integrity()
"""


def test_a_step_without_memory_raises_and_runs_later(tmp_path):
    tiny_mixtral(
        num_hidden_layers=1, num_attention_heads=64, head_dim=256, max_position_embeddings=2048
    ).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no memory for an instruction of a step" in done.stdout
