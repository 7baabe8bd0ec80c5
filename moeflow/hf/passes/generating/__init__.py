"""A model's `generate`: one step of it, and the candidates that it verifies.

Knows transformers' generation. Knows nothing of how drafts pay. `hf/`, `engine/` and `loading/` import it.
"""
