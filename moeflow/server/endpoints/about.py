"""What a server says of itself: /health, /v1/models, /stats and /metrics.

Knows the service's state and figures.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from moeflow.server.wire.errors import HttpError, JsonResponse

if TYPE_CHECKING:
    from moeflow.server.service import Service


async def health(request: Request) -> Response:
    """Say whether a model is there: 200 while it loads and answers, 503 when it will not any more."""
    service: Service = request.app.state.service
    status = service.status
    told = {"status": status} | ({"progress": service.progress} if status == "loading" else {})
    return JsonResponse(told, 200 if status in ("ok", "loading") else 503)


async def list_models(request: Request) -> Response:
    """List the one model."""
    service: Service = request.app.state.service
    return JsonResponse({"object": "list", "data": [service.model.about()]})


async def show_model(request: Request) -> Response:
    """Describe a model by its name.

    Raises:
        HttpError: 404, it is not served.
    """
    service: Service = request.app.state.service
    service.model.check_name(request.path_params["name"])
    return JsonResponse(service.model.about())


async def stats(request: Request) -> Response:
    """Return what the engine, the model and HTTP count; with ?experts=1 also which experts are resident."""
    service: Service = request.app.state.service
    figures = service.figures or {"engine": None, "model": None}
    told = {"name": service.model.name, "engine": figures["engine"], "model": figures["model"]}
    told["http"] = {"cpu_s": time.thread_time()}  # this is the event loop's thread
    asked = request.query_params.get("experts", "0")
    if asked not in ("0", "1"):
        raise HttpError(400, f"experts is {asked[:20]!r}; it must be 0 or 1.", param="experts")
    return JsonResponse(told | ({"experts": service.resident_rows()} if asked == "1" else {}))


async def metrics(request: Request) -> Response:
    """Return the figures in Prometheus' text form."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
