"""config.json and generation_config.json of a folder, read and checked before transformers sees them.

Knows files and transformers' configs. Knows nothing of weights. `hf/` imports it.
"""
