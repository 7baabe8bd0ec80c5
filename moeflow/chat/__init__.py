"""A conversation in the terminal: one person, one answer at a time.

Knows conversations, one generation and the screen. Knows nothing of requests that run together. `cli/` and `batch/`
import it, `batch/` only `conversation.py`.
"""
