"""Lookup: what a text said behind its end, where that occurred in it before.

Knows token ids. Knows nothing of models or sequences of an engine. `engine/` and `loading/` import it.
"""
