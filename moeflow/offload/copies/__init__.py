"""Experts on their way into slots: one transfer, the threads that read, and the comparison of what arrived.

Knows reads, slots and checksums. Knows nothing of passes. `offload/` and `loading/` import it.
"""
