"""An OpenAI-compatible server on one model: what comes over HTTP, what the engine runs, what goes back.

Knows the engine, chat templates, SamplingParams and ASGI. Knows nothing of how a model was loaded, or of terminals.
Only `cli/` imports it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeflow.server.app import create_app
    from moeflow.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":  # on first use, since its modules import torch and FastAPI
        from moeflow.server.app import create_app

        return create_app
    if name == "ServerSettings":
        from moeflow.server.settings import ServerSettings

        return ServerSettings
    raise AttributeError(f"module 'moeflow.server' has no attribute {name!r}")
