"""A predictor over the sequence of routes so far: network, inputs, training, predictions.

Knows routes and token ids. Knows nothing of caches or devices. `predictors/files.py` and `trace/` import it.
"""
