"""`moeflow doctor`: what this machine and a model's files have wrong, and what to do; and the trial runs behind it.

Knows every room that a model needs. Knows nothing of requests or of the command line. Only `cli/` imports it.
"""
