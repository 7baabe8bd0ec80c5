"""Traces of a small model, and the link they are replayed over."""

import numpy as np

from helpers.fake_predictor import random_routes
from moeflow.replay.link import LinkModel
from moeflow.trace.format import DECODE, PREFILL, TraceFormat
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.writer import TraceWriter

L, E, K = 4, 8, 2

LINK = LinkModel(expert_bytes=2, bytes_per_s=1.0, layer_s=3.0, in_flight=4)  # a copy takes 2 s, a layer 3 s


def trace_of(*sequences, num_experts=E, prompt=0):
    """A trace of experts [T, L, K], the first `prompt` rows of each sequence prefill."""
    routes = np.concatenate(sequences)
    format = TraceFormat((num_experts,) * routes.shape[1], routes.shape[2], "model", has_weights=False)
    rows = np.zeros(len(routes), format.dtype)
    rows["experts"] = routes
    rows["sequence"] = np.repeat(np.arange(len(sequences)), [len(one) for one in sequences])
    positions = np.concatenate([np.arange(len(one)) for one in sequences])
    rows["token_id"] = positions
    rows["phase"] = np.where(positions < prompt, PREFILL, DECODE)
    return RoutingTrace(format, rows)


def write_random_trace(path):
    """Write six sequences of 12 to 17 tokens of random routes."""
    trace = trace_of(*[np.sort(random_routes(12 + seed, L, E, K, seed)) for seed in range(6)])
    with TraceWriter(path, trace.format) as writer:
        rows = writer.new_rows(len(trace))
        for name in ("token_id", "sequence", "experts", "phase"):
            rows[name] = trace._field(name)
        writer.write(rows)
    return path
