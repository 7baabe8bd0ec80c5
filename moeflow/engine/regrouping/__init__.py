"""ExpertFlow's token scheduler: splits the sequences of a step into groups that activate fewer experts.

Knows routes as bit sets. Knows nothing of models or sequences' contents. `engine/` imports it.
"""
