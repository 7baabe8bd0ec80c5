"""What a model takes and how fast it runs on a machine, said before it is loaded, and the plan that loading obeys.

Sizes come from headers alone, speeds from a machine's profile and a model of a step's time. Knows nothing of torch or
of how a model is loaded. `loading/` and `cli/` import it.
"""
