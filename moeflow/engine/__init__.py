"""Many requests on one model: sequences, scheduler, model runner, KV cache, sampling.

Knows a loaded model. Knows nothing of how it was loaded, of files, terminals or HTTP. `chat/`, `batch/` and `cli/`
import it.
"""
