"""What would have happened: policies, predictors and machines over a recorded trace; figures and an HTML page.

Knows traces and policies. Knows nothing of models or torch. Only `cli/` and scripts import it.
"""
