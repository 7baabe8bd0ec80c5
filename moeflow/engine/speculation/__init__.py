"""Speculation: tokens that are drafted behind each sequence's last one, and the gate that says how many pay.

Knows sequences, token ids and what steps took. Knows nothing of slots or sampling. `engine/` imports it.
"""
