"""What the server tells of its engine: metrics, steps as a trace or for the page, why a request took so long."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from minillm.server.errors import ApiError
from minillm.server.metrics import CONTENT_TYPE, metrics_text
from minillm.server.service import Service

__all__ = ["insight_router"]

NOT_STARTED = "It has not reached the engine: earlier requests, or users with a smaller share so far, come first."


def insight_router(service: Service) -> APIRouter:
    """Endpoints that only look."""
    router, engine = APIRouter(), service.engine

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        figures = await engine.ask("figures")
        figures["totals"]["num_waiting"] = engine.load.num_waiting  # those before the engine too
        figures["totals"]["num_output_tokens"] = service.num_output_tokens
        text = metrics_text(figures, service.model_name, with_vllm_names=service.config.vllm_metrics)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @router.get("/trace", response_model=None)
    async def trace() -> Response:
        """The last steps, for ui.perfetto.dev or chrome://tracing."""
        return download(await engine.ask("trace"), "minillm-trace.json")

    @router.get("/recording", response_model=None)
    async def recording() -> Response:
        """The flight recording, for `minillm replay`: ids and sizes, no contents."""
        found = await engine.ask("recording")
        if found is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "this server keeps no flight recording: recorded_steps is 0")
        return download(found, "minillm-recording.json")

    @router.get("/v1/requests/{request_id}/explain")
    async def explain(request_id: Annotated[str, Path(max_length=200)]) -> dict[str, Any]:
        """Why a request took as long as it did, completion by completion."""
        completions = []
        for key in service.recent.find(request_id) or ():
            account = await engine.ask("explain", key=key)
            if account is not None:
                completions.append(account)
            elif engine.is_unfinished(key):
                completions.append({"state": "held back", "words": [NOT_STARTED]})
        if not completions:
            raise ApiError(HTTPStatus.NOT_FOUND, "no request of this id is known; only the last ones are kept")
        return {"id": request_id, "object": "request.explanation", "completions": completions}

    @router.get("/insight/requests/{number}")
    async def explain_number(number: Annotated[int, Path(ge=1, lt=2**63)]) -> dict[str, Any]:
        """The same for one completion, by its number in the engine, as the page shows it."""
        account: dict[str, Any] | None = await engine.ask("explain", number=number)
        if account is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "no request of this number is known; only the last ones are kept")
        return account

    @router.get("/insight/feed")
    async def feed(since: Annotated[int, Query(ge=-1, lt=2**63)] = -1) -> dict[str, Any]:
        """What the page shows: steps after `since`, requests, blocks."""
        shown: dict[str, Any] = await engine.ask("feed", since=since)
        server = {"model": service.model_name, "created": service.created}
        return shown | server | {"num_waiting": engine.load.num_waiting}

    return router


def download(text: str, name: str) -> Response:
    """JSON to be saved as a file."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type="application/json", headers=headers)
