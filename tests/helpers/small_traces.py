"""A trace whose routes follow from token and layer."""

import numpy as np

from moeflow.trace.format import DECODE, PREFILL, TraceFormat
from moeflow.trace.trace import RoutingTrace

L, E, K = 4, 8, 2


def make_trace(num_sequences=12, duplicates=(), prompt=0, seed=0, fingerprint="model-a", lookahead=None):
    """A trace whose routes follow from token and layer, sequences of different lengths."""
    rng = np.random.default_rng(seed)
    experts_of = np.random.default_rng(1).random((6, L, E)).argsort(-1)[:, :, :K]
    lengths = rng.integers(8, 20, num_sequences)
    format = TraceFormat((E,) * L, K, fingerprint, lookahead=lookahead)
    rows = np.zeros(lengths.sum(), format.dtype)
    rows["sequence"] = np.repeat(np.arange(num_sequences), lengths)
    rows["token_id"] = rng.integers(0, 6, len(rows))
    rows["experts"] = experts_of[rows["token_id"]]
    rows["weights"] = (0.7, 0.3)
    positions = np.concatenate([np.arange(length) for length in lengths])
    rows["phase"] = np.where(positions < prompt, PREFILL, DECODE)
    if lookahead is not None:
        rows["lookahead"] = np.random.default_rng(2).integers(0, E, rows["lookahead"].shape)
    facts = [{"duplicate": number in duplicates} for number in range(num_sequences)]
    return RoutingTrace(format, rows, sequence_facts=facts)
