"""Policies for very long contexts: which positions a query sees, and which a sequence forgets. Lossy.

Knows slots and the attention of one sequence in one layer. Knows nothing of models, budgets or requests. `engine/`
imports it.
"""
