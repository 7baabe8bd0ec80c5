"""GGUF files as models of transformers: their architectures, configs and tokenizers, and what becomes of each tensor.

Knows transformers and GGUF's names. Knows nothing of caches or budgets. `hf/`, `convert/`, `doctor/`
and `cli/` import it.
"""
