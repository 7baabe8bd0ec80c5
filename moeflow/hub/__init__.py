"""The hub: files of a repository, their transfer by ranges, the folders they go to, and headers of weights over HTTP.

Knows HTTP, files and headers of checkpoints. Knows nothing of torch, transformers or what a model computes. `hf/`,
`fit/`, `convert/` and `cli/` import it.
"""
