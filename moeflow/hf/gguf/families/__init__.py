"""The architectures of GGUF, a file for each group of relatives: configs both ways, and rules.

Knows names and keys. Knows nothing of files, folders or blocks. `hf/` imports it.
"""
