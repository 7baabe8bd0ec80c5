"""GGUF files: their headers, read without trust, and the places of their tensors, over all splits.

Knows bytes on disk. Knows nothing of models or torch. `checkpoint/`, `hub/`, `hf/`, `fit/`, `doctor/` and `cli/` import
it.
"""
