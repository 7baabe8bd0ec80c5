"""Decisions in pure numbers: which expert stays, which is fetched, where a miss is computed.

Knows numbers and predictors. Knows nothing of torch, threads or files, so that replay and live run the same code.
`offload/`, `replay/` and `loading/` import it.
"""
