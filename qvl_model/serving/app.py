"""The routes: chat completions, whole or as a stream, models, health and metrics."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError

from qvl_model.cli.answers import Conversation
from qvl_model.serving import engine, schema
from qvl_model.serving.images import image_of

__all__ = ["Limits", "build_app"]

POLL = 0.5  # seconds between two looks whether a client is still there


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        max_tokens: of an answer; also the default.
        timeout: seconds from the request to the end of its answer.
        fetch: whether images may be http(s) URLs of public addresses.
    """

    max_body: int = 20 << 20  # bytes
    max_pixels: int = 20_000_000  # of an image
    max_images: int = 16
    max_tokens: int = 4096
    timeout: float = 600.0
    fetch: bool = False
    api_key: str | None = None


class _Refused(Exception):
    """A request that gets an error with this status."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        headers = {"Retry-After": "1"} if self.status == 429 else {}
        return JSONResponse(schema.error(str(self), kind, self.code, self.param), self.status, headers=headers)


class _Metrics:
    """Of one app."""

    def __init__(self, waiting: Any) -> None:
        self.registry = at = CollectorRegistry()
        self.requests = Counter("qvl_requests", "requests by status", ["status"], registry=at)
        self.tokens = Counter("qvl_tokens", "tokens of prompts and answers", ["kind"], registry=at)
        self.first = Histogram("qvl_first_token_seconds", "seconds to the first piece of text", registry=at)
        Gauge("qvl_waiting", "requests that wait", registry=at).set_function(waiting)


class _Answer:
    """The pieces of one answer, from the engine's thread to the event loop."""

    def __init__(self, limits: Limits, metrics: _Metrics) -> None:
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[str | engine.End]()
        self._start, self._limits, self._metrics, self._first = time.monotonic(), limits, metrics, True
        self.request: engine.Request | None = None

    def deliver(self, piece: str | engine.End) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self, client: Request) -> str | engine.End:
        """The next piece. Raises: _Refused after the time limit, and if the client has gone."""
        while True:
            left = self._start + self._limits.timeout - time.monotonic()
            try:
                piece = await asyncio.wait_for(self._pieces.get(), min(POLL, max(left, 0.01)))
            except TimeoutError:
                if left <= 0:
                    self.cancel()
                    raise _Refused(504, f"no answer within {self._limits.timeout:g} s", "timeout") from None
                if await client.is_disconnected():
                    self.cancel()
                    raise _Refused(499, "the client has gone") from None
                continue
            if isinstance(piece, engine.End):
                self._count(piece)
            elif self._first:
                self._first = False
                self._metrics.first.observe(time.monotonic() - self._start)
            return piece

    def _count(self, end: engine.End) -> None:
        self._metrics.tokens.labels("prompt").inc(end.prompt_tokens)
        self._metrics.tokens.labels("answer").inc(end.completion_tokens)
        if end.reason == "refused":
            raise _Refused(400, end.message)
        if end.reason in ("failed", "cancelled"):
            raise _Refused(500 if end.reason == "failed" else 503, end.message or "the server is stopping")

    def cancel(self) -> None:
        """The engine stops working on the answer, and its row of the batch is free."""
        if self.request is not None:
            self.request.cancelled.set()


def build_app(serving: engine.Engine, name: str, limits: Limits | None = None) -> FastAPI:
    """The app over an engine; ``name`` is that of the model, as clients see it.

    Example:
        >>> uvicorn.run(build_app(Engine(models.load("digits")), "digits"))
    """
    limits = limits or Limits()
    metrics = _Metrics(lambda: serving.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(serving.close)

    async def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if limits.api_key and not hmac.compare_digest(given.encode(), limits.api_key.encode()):
            raise _Refused(401, "the API key is missing or wrong", "invalid_api_key")

    app = FastAPI(lifespan=lifespan, title="qvl", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(_Refused)
    async def refused(_: Request, problem: _Refused) -> JSONResponse:
        metrics.requests.labels(problem.status).inc()
        return problem.response()

    @app.post("/v1/chat/completions", dependencies=[Depends(authorised)])
    async def chat(client: Request) -> Response:
        asked = _parsed(await _body(client, limits.max_body))
        if asked.model not in (None, "", name):
            raise _Refused(404, f"the model {asked.model!r} is not here; this server has {name!r}", "model_not_found")
        answer = _Answer(limits, metrics)
        conversation = await asyncio.to_thread(_conversation, asked, limits)
        answer.request = _request(asked, conversation, answer, limits)
        try:
            serving.submit(answer.request)
        except engine.Busy:
            raise _Refused(429, "too many requests wait; try again", "queue_full") from None
        identity = f"chatcmpl-{secrets.token_hex(12)}"
        try:
            first = await answer.next(client)  # so that what cannot be answered gets a status of its own
            if asked.stream:
                events = _events(identity, name, first, answer, client, asked)
                metrics.requests.labels(200).inc()
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            pieces = [first]
            while not isinstance(pieces[-1], engine.End):
                pieces.append(await answer.next(client))
        except BaseException:
            answer.cancel()
            raise
        end = pieces.pop()
        assert isinstance(end, engine.End)
        tokens = schema.usage(end.prompt_tokens, end.completion_tokens)
        metrics.requests.labels(200).inc()
        return JSONResponse(schema.completion(identity, name, "".join(map(str, pieces)), end.reason, tokens))

    @app.get("/v1/models", dependencies=[Depends(authorised)])
    async def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "qvl"}]}

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "waiting": serving.waiting}

    @app.get("/metrics", dependencies=[Depends(authorised)])
    async def measured() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _body(client: Request, limit: int) -> bytes:
    """Raises: _Refused for another type than JSON (which browsers let other sites send), and for too many bytes."""
    if client.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "the body must be JSON, with Content-Type: application/json")
    declared = client.headers.get("content-length", "0")
    found = bytearray()
    if not declared.isdigit() or int(declared) <= limit:
        async for part in client.stream():
            found += part
            if len(found) > limit:
                break
        else:
            return bytes(found)
    raise _Refused(413, f"the body has more than {limit} bytes", "body_too_large")


def _parsed(body: bytes) -> schema.ChatRequest:
    try:
        return schema.ChatRequest.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise _Refused(400, f"{place}: {first['msg']}", param=place) from error
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"the body is no JSON: {' '.join(str(error).split())[:200]}") from error


def _conversation(asked: schema.ChatRequest, limits: Limits) -> Conversation:
    """Raises: _Refused for images that cannot be taken, and texts that are no text."""
    conversation = Conversation()
    for i, message in enumerate(asked.messages):
        role = "system" if message.role == "developer" else message.role
        content: list[dict] = []
        parts = message.content
        for part in [schema.TextPart(type="text", text=parts)] if isinstance(parts, str) else parts:
            if isinstance(part, schema.TextPart):
                try:
                    part.text.encode()
                except UnicodeEncodeError:
                    raise _Refused(400, "a text has half of a character (a lone surrogate)", param="messages") from None
                content.append({"type": "text", "text": part.text})
                continue
            if role != "user":
                raise _Refused(400, f"messages.{i}: only users show images", param="messages")
            if len(conversation.images) >= limits.max_images:
                raise _Refused(400, f"more than {limits.max_images} images", param="messages")
            try:
                found = image_of(
                    part.image_url.url,
                    max_pixels=limits.max_pixels,
                    max_bytes=limits.max_body,
                    fetch=limits.fetch,
                )
            except ValueError as error:
                raise _Refused(400, f"messages.{i}: {error}", "invalid_image", "messages") from error
            conversation.images.append(found)
            content.append({"type": "image"})
        conversation.messages.append({"role": role, "content": content})
    return conversation


def _request(asked: schema.ChatRequest, conversation: Conversation, answer: _Answer, limits: Limits) -> engine.Request:
    wanted = asked.max_completion_tokens or asked.max_tokens or limits.max_tokens
    options: dict[str, Any] = {}
    if asked.temperature == 0:
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif asked.temperature is not None or asked.top_p is not None or asked.seed is not None:
        chosen = {"temperature": asked.temperature, "top_p": asked.top_p}
        options = {"do_sample": True, **{key: value for key, value in chosen.items() if value is not None}}
    options["num_beams"] = 1  # of which a stream can be made
    return engine.Request(
        conversation, options, min(wanted, limits.max_tokens), answer.deliver, seed=asked.seed, stop=asked.stops
    )


async def _events(
    identity: str,
    name: str,
    first: str | engine.End,
    answer: _Answer,
    client: Request,
    asked: schema.ChatRequest,
) -> AsyncIterator[str]:
    """Server-sent events of a stream. If the client goes, the answer ends."""

    def event(content: dict) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        yield event(schema.chunk(identity, name, {"role": "assistant", "content": ""}))
        piece = first
        while not isinstance(piece, engine.End):
            yield event(schema.chunk(identity, name, {"content": piece}))
            piece = await answer.next(client)
        yield event(schema.chunk(identity, name, {}, piece.reason))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            tokens = schema.usage(piece.prompt_tokens, piece.completion_tokens)
            yield event(schema.chunk(identity, name, None, tokens=tokens))
        yield "data: [DONE]\n\n"
    except _Refused as problem:
        yield event(schema.error(str(problem), "server_error", problem.code))
    finally:
        answer.cancel()
