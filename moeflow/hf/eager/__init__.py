"""Routed experts as transformers itself loads and runs them, one expert at a time: what others are compared with.

Knows transformers' conversions and its modules' own forward. Knows nothing of runtimes. `verify/` imports it.
"""
