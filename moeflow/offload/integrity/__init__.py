"""Compares slots with their source now and then, in a thread of its own.

Knows slots, checksums and the store. Knows nothing of passes. `offload/` and `loading/` import it.
"""
