"""The architectures of GGUF, a file for each group of relatives. Knows names and keys. `hf/gguf` imports it."""
