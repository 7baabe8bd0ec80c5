"""Write a checkpoint whose experts are rounded to four bits, and run it.

python docs/examples/quantize.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from moeflow import load_moe
from moeflow.convert.quantize import quantize_model
from moeflow.demo.model import build_demo_model

folder = sys.argv[1] if len(sys.argv) > 1 else str(build_demo_model())
tokenizer = AutoTokenizer.from_pretrained(folder)
with tempfile.TemporaryDirectory() as work:
    written = quantize_model(folder, Path(work) / "int4", "int4-g32")
    print(f"{written.bits_per_weight:.2f} bits a weight, {written.expert_bytes:,} bytes of experts")
    model = load_moe(written.folder, expert_memory="40%")
    with model.moeflow:
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(tokenizer.decode(tokens[0]))
