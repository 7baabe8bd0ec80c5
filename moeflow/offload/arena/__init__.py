"""How much memory experts may take: a device's slots in segments, and governors that follow the memory that is free.

Knows slots and free bytes. Knows nothing of which expert sits where. `offload/`, `loading/` and `engine/` import it.
"""
