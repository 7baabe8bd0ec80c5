"""Record which experts the tokens take, and replay eviction policies on that trace.

python docs/examples/record_trace.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from moeflow import load_moe
from moeflow.demo.model import build_demo_model
from moeflow.replay.demand import replay_trace
from moeflow.trace.trace import RoutingTrace

folder = sys.argv[1] if len(sys.argv) > 1 else str(build_demo_model())
tokenizer = AutoTokenizer.from_pretrained(folder)
with tempfile.TemporaryDirectory() as work:
    path = Path(work) / "routes.trace"
    model = load_moe(folder, expert_memory="40%", trace=path)
    with model.moeflow:
        for prompt in ("The capital of France is", "Once upon a time"):
            inputs = tokenizer(prompt, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    trace = RoutingTrace.open(path)
    for row in replay_trace(trace, [30, 50], ["lru", "lfru", "belady"]):
        print(f"{row['policy']:>7} at {row['residency']} %: hit rate {row['hit_rate']:.2f}")
