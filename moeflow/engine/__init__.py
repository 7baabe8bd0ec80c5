"""Many requests on one model: sequences, scheduler, model runner, KV cache, sampling.

Knows a loaded model. Knows nothing of how it was loaded, of files, terminals or HTTP. `chat/`, `batch/`, `server/`
and `cli/` import it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeflow.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    if name == "Engine":  # on first use, since its modules import torch
        from moeflow.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'moeflow.engine' has no attribute {name!r}")
