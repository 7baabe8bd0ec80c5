"""What no plan can be below: balance, partition and path bounds.

Know problems as numbers. Know nothing of who searches. Solvers import them.
"""
