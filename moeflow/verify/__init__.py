"""Compares a loaded model with its reference, layer by layer, and measures what another folder's experts cost.

Knows loading, stores and transformers' own experts. Knows nothing of requests or answers. Only `cli/` imports it.
"""
