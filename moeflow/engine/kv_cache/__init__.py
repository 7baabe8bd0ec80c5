"""KV cache: slots of sequences that run, and a prefix tree of what others have computed, inside one budget.

`kept/` has what has ended, `policies/` what very long contexts leave out.

Knows shapes, tensors, bytes and sequences. Knows nothing of models or of who waits. `engine/` and `chat/`
import it.
"""
