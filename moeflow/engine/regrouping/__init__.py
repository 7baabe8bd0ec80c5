"""ExpertFlow's token scheduler: splits the sequences of a step into groups that activate fewer experts.

Knows routes as bit sets; its groups of a step watch a model's routers. Knows nothing of sequences' contents. `engine/`
imports it.
"""
