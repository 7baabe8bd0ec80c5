"""Runs a loaded model over text and learns about its experts: inputs, errors per format, pruning thresholds.

Knows models and formats. Knows nothing of how a model is loaded. `loading/`, `convert/`, `verify/` and `demo/`
import it.
"""
