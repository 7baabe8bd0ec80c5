"""The decode step of a model as a program that runs without Python, from one missing expert to the next.

`capture` takes the step from the model, `lower` writes it as instructions, `Program` holds them as data, `StepRunner`
runs them. Knows nothing of budgets or policies. Only `loading/` imports it.
"""
