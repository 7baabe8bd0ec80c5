"""Generate text with a quarter of the experts in memory, and say what that cost.

python docs/examples/generate.py [MODEL]
"""

import sys

from transformers import AutoTokenizer

from moeflow import load_moe
from moeflow.demo.model import build_demo_model

folder = sys.argv[1] if len(sys.argv) > 1 else str(build_demo_model())
tokenizer = AutoTokenizer.from_pretrained(folder)
model = load_moe(folder, expert_memory="40%")
with model.moeflow:  # closes the expert files at the end
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(tokens[0]))
    decode = model.moeflow.stats()["decode"]
print(f"hit rate {decode['hit_rate']:.2f}, {decode['bytes_from_disk']:,} bytes read for {decode['tokens']} tokens")
