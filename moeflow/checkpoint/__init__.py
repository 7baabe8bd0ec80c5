"""Bytes on disk: where an expert's bytes lie, how a packed file is laid out, reading one expert.

Knows files and formats of weights. Knows nothing of transformers, caches or devices. `hub/`, `hf/`, `offload/`,
`calibration/`, `fit/`, `loading/`, `convert/`, `verify/`, `demo/` and `doctor/` import it.
"""
