"""Writes another checkpoint from one: packed, quantised, or with a format for each expert.

Knows loading and calibration. Knows nothing of requests or answers. Only `cli/` imports it.
"""
