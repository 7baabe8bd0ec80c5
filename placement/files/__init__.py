"""Files of placement: counts, topologies and plans in, plans and engines' formats out.

Know formats. Know nothing of solving. `trace/`, `expert_parallel/` and `cli/` import them.
"""
