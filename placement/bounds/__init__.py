"""Lower bounds of every plan: balance, partition and path.

Know problems as numbers. Know nothing of searches. Only other files of `placement/` import them.
"""
