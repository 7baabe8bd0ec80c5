"""A model's passes as transformers runs them: calls, caches, attention, rotary embeddings, captured decode steps,
lossless dense weights.

Knows nothing of experts' places, budgets or requests. `moe/`, `step/`, `trace/`, `calibration/`, `loading/`,
`engine/`, `verify/`, `chat/`, `batch/` and `server/` import it.
"""
