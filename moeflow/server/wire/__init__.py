"""HTTP itself: the guard before the application, bodies, event streams, errors, connections.

Knows ASGI and uvicorn. Knows nothing of models, prompts or the engine. `server/` and `cli/` import it.
"""
