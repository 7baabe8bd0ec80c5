"""Checks of a model's files, all of them read: shards, packed experts, values, tokenizer, and a trial of 16 tokens.

Know files and the loader. Know nothing of the machine. Only `doctor/` imports them.
"""
