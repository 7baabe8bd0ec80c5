"""Routing traces: the file, writing, recording, converting, counting, training a predictor on one.

Knows routes and their sources. Knows nothing of caches. `replay/`, `fit/`, `loading/`,
`engine/` and `cli/` import it.
"""
