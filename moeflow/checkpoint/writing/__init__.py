"""Parts of writing a packed folder: the order of its records, its dense file, the shards that it is written from.

Knows files, tensors and records by their places. Knows nothing of models or of networks. `checkpoint/` and `convert/`
import it.
"""
