"""Checkpoints whose weights are quantised already: their tensors, values, and records in the weight formats.

Knows headers, bytes and formats. Knows nothing of models. `hf/` imports it.
"""
