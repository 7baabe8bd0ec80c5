"""A conversation in the terminal: one person, one answer at a time.

Knows conversations, one generation and the screen. Knows nothing of requests that run together. `server/`
(for a checkpoint's own sampling) and `cli/` import it.
"""
