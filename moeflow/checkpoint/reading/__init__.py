"""Parts of reading one expert: whether a file is the one that it was, byte ranges merged into few or cut into parts.

Knows byte ranges and memory. Knows nothing of layers' formats or threads. `checkpoint/`, `hub/`, `hf/`, `loading/`
and `offload/` import it.
"""
