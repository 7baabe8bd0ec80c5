"""Run several prompts together: an expert that is fetched serves the tokens of all of them.

python docs/examples/engine_batch.py [MODEL]
"""

import sys

from transformers import AutoTokenizer

from moeflow import Engine, SamplingParams, load_moe
from moeflow.demo.model import build_demo_model

folder = sys.argv[1] if len(sys.argv) > 1 else str(build_demo_model())
prompts = ["The capital of France is", "Once upon a time", "The sun is"]
params = [SamplingParams(max_new_tokens=12), SamplingParams(max_new_tokens=12, temperature=0.8, seed=1)]

model = load_moe(folder, expert_memory="40%")
with model.moeflow, Engine(model, AutoTokenizer.from_pretrained(folder), max_batch_size=8) as engine:
    for prompt, completion in zip(prompts, engine.generate(prompts, [*params, params[0]]), strict=True):
        print(f"{prompt!r} -> {completion.text!r} ({completion.finish_reason})")
    print(f"{engine.stats()['steps']} steps for {engine.stats()['new_tokens']} new tokens")
