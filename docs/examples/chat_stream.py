"""Print the answer to one chat message while it is generated.

python docs/examples/chat_stream.py [MODEL]
"""

import sys

from transformers import AutoTokenizer

from moeflow import Engine, SamplingParams, load_moe
from moeflow.demo.model import build_demo_model

folder = sys.argv[1] if len(sys.argv) > 1 else str(build_demo_model())
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{"role": "user", "content": "Name three rivers."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]

model = load_moe(folder, expert_memory="40%")
with model.moeflow, Engine(model, tokenizer) as engine:
    for piece in engine.stream(prompt_ids, SamplingParams(max_new_tokens=32)):
        print(piece, end="", flush=True)
    print()
