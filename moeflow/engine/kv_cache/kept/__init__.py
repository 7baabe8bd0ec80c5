"""What is kept of sequences that have ended: a prefix tree of their keys and values, its files, and moving out of it.

Knows tokens, slots and bytes. Knows nothing of sequences or models. `engine/` imports it.
"""
