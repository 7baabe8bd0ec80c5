"""Train a predictor of routes on a trace, and let it say what to prefetch.

python docs/examples/predictor.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from moeflow import load_moe
from moeflow.demo.model import build_demo_model
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.train_predictor import train_predictor

folder = sys.argv[1] if len(sys.argv) > 1 else str(build_demo_model())
tokenizer = AutoTokenizer.from_pretrained(folder)
with tempfile.TemporaryDirectory() as work:
    trace, predictor = Path(work) / "routes.trace", Path(work) / "routes.predictor"
    model = load_moe(folder, expert_memory="40%", trace=trace)
    with model.moeflow:
        for subject in ("France", "rivers", "music", "winter", "bread"):  # every fifth sequence is held out
            inputs = tokenizer(f"A short text about {subject}:", return_tensors="pt")
            model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
    train_predictor(RoutingTrace.open(trace), "sequence", predictor)
    model = load_moe(folder, expert_memory="40%", predictor=predictor)
    with model.moeflow:
        model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        prefetch = model.moeflow.stats()["prediction"]["prefetch"]
print(f"sequence: {prefetch['issued']} prefetches, {prefetch['in_time']} in time, {prefetch['late']} late")
