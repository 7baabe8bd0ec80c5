"""A trial: a model is loaded with the smallest budget and writes 16 tokens.

Knows load_moe. Knows nothing of files.
"""

import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from moeflow.doctor.finding import BROKEN, HARMFUL, Finding
from moeflow.doctor.model.tokenizer import PROMPT
from moeflow.errors import MoeflowError
from moeflow.formatting import brief, format_bytes, format_seconds
from moeflow.hardware import available_memory_bytes
from moeflow.hf.encoding import encode_text
from moeflow.loading.describe import describe_model
from moeflow.loading.load_moe import load_moe

NUM_TOKENS = 16
_ROOM_BYTES = 256 << 20  # beside weights: activations, keys and values, buffers of reads


def check_trial(folder: Path, tokenizer: PreTrainedTokenizerBase | None, found: list[Finding]) -> None:
    """Load a model and let it write.

    Args:
        folder: of the model.
        tokenizer: its own; without one it gets a few token numbers.
        found: findings are added to it.
    """
    try:
        about = describe_model(folder)
        budget, needed = about["minimum_bytes"], about["minimum_bytes"] + about["dense_bytes"] + _ROOM_BYTES
        if needed > available_memory_bytes():
            wrong = f"it needs {format_bytes(needed)}, and {format_bytes(available_memory_bytes())} are free"
            found.append(Finding("trial", "not run", HARMFUL, wrong, "end other programs, or take a smaller model"))
            return
        ids = encode_text(tokenizer, PROMPT) if tokenizer is not None else [1, 2, 3]
        begin = time.perf_counter()
        model = load_moe(folder, expert_memory=budget, predictor=None, step="python")
        with model.moeflow:
            loaded = time.perf_counter()
            output = model.generate(
                torch.tensor([ids], device=model.device), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS,
                do_sample=False, output_scores=True, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            seconds = time.perf_counter() - loaded
    except MoeflowError as error:
        remedy = "mend what else is named; if that is nothing, download the model again"
        found.append(Finding("trial", "it failed", BROKEN, str(error), remedy))
        return
    finite = all(bool(torch.isfinite(logits).all()) for logits in output.logits)
    written = output.sequences[0, len(ids) :]
    text = tokenizer.decode(written) if tokenizer is not None else written.tolist()
    shown = (
        f"loaded in {format_seconds(loaded - begin)} with {format_bytes(budget)} for experts, {NUM_TOKENS} tokens in "
        f"{format_seconds(seconds)}: {brief(repr(text), 120)}"
    )
    if finite:
        found.append(Finding("trial", shown))
    else:
        wrong = "the model's logits are NaN or infinite"
        found.append(Finding("trial", shown, BROKEN, wrong, "look for NaN above; try dtype=float32"))
