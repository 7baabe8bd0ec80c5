"""The only folder that knows transformers' internals: empty models, the experts interface, forward passes, norms.

Knows transformers and checkpoints. Knows nothing of caches, slots or predictions. `moe/`, `step/`, `trace/`,
`calibration/`, `fit/`, `loading/`, `engine/`, `expert_parallel/`, `convert/`, `verify/`, `demo/`, `chat/`, `batch/`,
`server/`, `doctor/` and `cli/` import it.
"""
