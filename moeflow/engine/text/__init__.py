"""Text of answers: what tokens say as they come, and where a stop string ends it.

Knows tokenizers. Knows nothing of models or sequences. `engine/` and `chat/` import it.
"""
