"""Mechanism of offloading: slots, copies, streams, threads, residency, one lock. Does what `policy/` decides.

Knows records and devices. Knows nothing of routers, arithmetic or transformers. `moe/`, `step/`, `loading/`,
`expert_parallel/` and `verify/` import it.
"""
