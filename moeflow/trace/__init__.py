"""Routing traces: the file, writing, recording, converting, counting, training a predictor on one.

Knows routes and where they come from. Knows nothing of what a cache does with them. `replay/` and all rooms after it
import it.
"""
