"""Replays of a recorded trace: policies, predictors and machines over it; figures and an HTML page.

Knows traces and policies. Knows nothing of models or torch. Only `fit/`, `cli/` and scripts import it.
"""
