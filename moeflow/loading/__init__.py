"""`load_moe` and its parts: options, budgets, tiers, hooks, the description of a model from headers.

Knows how the rooms earlier in the order fit together. Knows nothing of requests. `convert/`, `verify/`, `doctor/`,
`cli/` and `moeflow` itself import it.
"""
