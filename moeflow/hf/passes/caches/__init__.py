"""Caches of keys and values that moeflow hands to transformers: one that grows, and one whose memory stays in place.

Knows transformers' cache classes. Knows nothing of passes. `hf/`, `moe/`, `step/`, `loading/` and `engine/` import it.
"""
