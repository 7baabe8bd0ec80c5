"""ExpertFlow's routing-path predictor: network, training, predictions.

Knows routes and token ids. Knows nothing of caches or devices. `predictors/files.py` and `trace/` import it.
"""
