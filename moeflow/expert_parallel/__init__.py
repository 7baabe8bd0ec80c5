"""Runs a placement plan over the ranks of torch.distributed.

Knows plans, MoE layers and process groups. Knows nothing of how a plan was found. Only `cli/` imports it.
"""
