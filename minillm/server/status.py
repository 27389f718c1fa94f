"""What the server says of itself: models, health, readiness, version; and text to token ids and back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from minillm.errors import RequestError
from minillm.server.protocol import DetokenizeRequest, TokenizeRequest
from minillm.server.service import Service

__all__ = ["status_router"]


def status_router(service: Service, version: str) -> APIRouter:
    """Endpoints that start nothing."""
    router, engine = APIRouter(), service.engine

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """200 while the engine runs and its steps advance whenever there is work; else 503."""
        status = "ok" if engine.is_healthy else "stalled" if engine.failure is None else "failed"
        return JSONResponse({"status": status}, 200 if engine.is_healthy else 503)

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """200 while new requests are welcome; else 503."""
        is_ready = engine.is_healthy and not engine.is_closing
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @router.get("/version")
    async def tell_version() -> dict[str, str]:
        """Version of MiniLLM."""
        return {"version": version}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [card()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model of that name."""
        service.check_model(name)
        return card()

    def card() -> dict[str, Any]:
        limits = engine.info.limits
        card = {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "minillm"}
        return card | {"max_model_len": limits.max_model_len}

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text or of a conversation."""
        service.check_model(body.model)
        if body.messages is not None:
            tokens = await service.encode_chat(body.messages, add_generation_prompt=body.add_generation_prompt)
        else:
            tokens = await service.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": engine.info.limits.max_model_len, "tokens": tokens}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        service.check_model(body.model)
        for at, token in enumerate(body.tokens):
            if not 0 <= token < engine.info.vocab_size:
                last = engine.info.vocab_size - 1
                raise RequestError(f"tokens has an id at {at} that is none: they are integers from 0 to {last}")
        return {"prompt": await service.decode(body.tokens)}

    return router
