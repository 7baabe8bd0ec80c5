"""Decisions in pure numbers: which expert stays, which is fetched, where a miss is computed, what may be asked
of keys and values of long contexts.

Knows numbers and predictors. Knows nothing of torch, threads or files, so that the replay over a link
(`moeflow/replay/link.py`) runs the same code as a live model. `offload/`, `replay/`, `loading/` and
`engine/` import it.
"""
