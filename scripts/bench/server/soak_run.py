"""The soak on a tiny random model whose experts lie on disk, in float32.

Knows how the model is made. Knows nothing of clients.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.server.soak import lines, soak
from make_random_moe import Shape, write_random_moe

SHAPE = Shape(
    layers=3, experts=8, top_k=2, hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocab=300, context=1024
)
KV_MEMORY = 1 << 18  # 341 positions: sequences give way, and what is kept leaves
__all__ = ["lines", "measure"]


def measure(arguments: argparse.Namespace) -> dict:
    """Return what came of the requests, and what is left."""
    from moeflow import load_moe

    with tempfile.TemporaryDirectory() as folder:
        write_random_moe(Path(folder) / "model", SHAPE)
        model = load_moe(Path(folder) / "model", dtype="float32", expert_memory="50%", device="cpu")
        with model.moeflow:
            return soak(model, byte_tokenizer(), arguments.soak_requests, kv_memory=KV_MEMORY)


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|end|>")
