"""Structured output: which tokens an answer's JSON schema, regular expression or grammar allows next.

Knows tokenizers and llguidance. Knows nothing of models, sequences or HTTP. `engine/`, `chat/`, `server/` and
`cli/` import it.
"""
