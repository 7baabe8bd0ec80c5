"""Small routing traces written to files."""

import numpy as np

from moeflow.trace.format import DECODE, PREFILL, TraceFormat
from moeflow.trace.writer import TraceWriter

FORMAT = TraceFormat((8, 8, 6), 2, "0123456789abcdef", source="a test")


def random_rows(writer, num_rows, seed=0):
    """Rows of two interleaved sequences, one prefill token each."""
    rng, rows = np.random.default_rng(seed), writer.new_rows(num_rows)
    rows["token_id"] = rng.integers(0, 1000, num_rows)
    rows["sequence"] = writer.next_sequence + np.arange(num_rows) % 2
    rows["phase"] = np.where(np.arange(num_rows) < 2, PREFILL, DECODE)
    rows["experts"] = rng.integers(0, 6, rows["experts"].shape)
    if writer.format.has_weights:
        rows["weights"] = rng.random(rows["weights"].shape)
    return rows


def write_trace(path):
    """Write ten rows in two parts and return them."""
    with TraceWriter(path, FORMAT) as writer:
        rows = random_rows(writer, 10)
        writer.write(rows[:4])
        writer.write(rows[4:])
    return rows


def write_skewed_trace(path):
    """Write 3 layers x 8 experts, 4 sequences of 50 tokens; the model's name is hostile."""
    rng = np.random.default_rng(0)
    odds = np.array([8, 4, 2, 1, 1, 1, 1, 1]) / 19
    with TraceWriter(path, TraceFormat((8, 8, 8), 2, "<script>evil</script>", has_weights=False)) as writer:
        rows = writer.new_rows(200)
        rows["experts"] = [[rng.choice(8, 2, False, odds) for _ in range(3)] for _ in range(200)]
        rows["sequence"], rows["phase"] = np.arange(200) // 50, DECODE
        writer.write(rows)
    return path
