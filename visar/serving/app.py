"""The HTTP API: OpenAI's images and models, health and metrics, over any `Studio`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from visar import __version__
from visar.errors import short
from visar.serving.access import Access
from visar.serving.answers import Answers, model_object
from visar.serving.body import ImagesBody, NoSuchModel
from visar.serving.gate import Gate, Keys
from visar.serving.jobs import Busy
from visar.serving.metrics import Metrics
from visar.serving.problems import INVALID, LONGEST_NAME, SERVER, Problem, problem_of, problem_of_body
from visar.serving.wanted import Accepted, Made, Studio, Told, Wanted

UNREAD = 60.0  # seconds that a stream waits for a client which does not read
ROUTE = "/v1/images/generations"
F = TypeVar("F", bound=Callable[..., Any])


def build(
    studio: Studio,
    *,
    access: Access | None = None,
    keys: Keys | None = None,
    metrics: Metrics | None = None,
    most_images: int = 10,
    deadline: float = 600,
    start: Callable[[], Awaitable[Any]] | None = None,
) -> FastAPI:
    """The app. A request has `most_images` images and `deadline` seconds at most; `start` is awaited beside it."""
    metrics = metrics or Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.ensure_future(start()) if start else None
        yield
        if task:
            task.cancel()

    app = FastAPI(
        title="visar", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False
    )
    app.state.studio = studio
    app.add_middleware(Gate, access=access or Access(), keys=keys or Keys())
    _errors(app)
    since = int(time.time())

    @app.post(ROUTE)
    async def generate(body: ImagesBody, request: Request) -> Response:
        if not studio.cards:
            problem = Problem(503, "The server is starting; ask again in a while.", SERVER, code="not_ready")
            return problem.response({"Retry-After": str(studio.retry_after)})
        if request.query_params:
            name = short(next(iter(request.query_params)), LONGEST_NAME)
            message = f"Fields are sent in the body; the address has {name!r}."
            return Problem(400, message, param=name, code="unknown_parameter").response()
        wanted = body.wanted(studio.cards, most_images=most_images, seconds=deadline)
        told = _counted(studio.images(wanted), wanted, metrics)
        try:
            accepted = await anext(told)
            assert isinstance(accepted, Accepted)
            answers = Answers(wanted, studio.cards[wanted.model], accepted)
            if body.stream:
                return _Stream(_events(told, answers), ping=15, send_timeout=UNREAD)
            async with aclosing(told):
                found = await _unless_gone(request, _all(told))
            return Response(status_code=499) if found is None else JSONResponse(answers.whole(found))
        except Exception as error:
            problem = problem_of(error)
            headers = {"Retry-After": str(studio.retry_after)} if isinstance(error, Busy) else {}
            return problem.response(headers)

    def read(path: str) -> Callable[[F], F]:
        """A route of GET, and of HEAD, by which balancers ask: the server sends the headers alone."""

        def both(route: F) -> F:
            app.head(path, include_in_schema=False)(route)  # one of two methods would give its name to both
            return app.get(path)(route)

        return both

    @read("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(card, since) for card in studio.cards.values()]}

    @read("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name not in studio.cards:
            raise NoSuchModel(f"There is no model {name[:100]!r} here; /v1/models lists those that are served.")
        return model_object(studio.cards[name], since)

    @read("/health")
    async def health() -> Response:
        if problem := studio.problem:
            return Problem(500, problem, SERVER, code="unhealthy").response()
        return JSONResponse({"status": "ok"})

    @read("/ready")
    async def ready() -> Response:
        if not studio.ready:
            return Problem(503, "The server is starting, ending or ill.", SERVER, code="not_ready").response()
        return JSONResponse({"status": "ready"})

    @read("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return app


def _errors(app: FastAPI) -> None:
    """All errors have one form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return problem_of_body(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = {404: "There is nothing here.", 405: "This method is not allowed here."}
        message = said.get(error.status_code, "The body must be a JSON object.")
        headers = dict(error.headers or {})
        if error.status_code == 405:  # GET and HEAD of an address are two routes, of which Starlette names the first
            here = [r for r in app.routes if isinstance(r, Route) and r.matches(request.scope)[0] != Match.NONE]
            headers["Allow"] = ", ".join(sorted({method for route in here for method in route.methods or ()}))
        return Problem(error.status_code, message, INVALID).response(headers)

    @app.exception_handler(NoSuchModel)
    async def missing(_: Request, error: NoSuchModel) -> Response:
        return problem_of(error).response()


async def _counted(told: AsyncGenerator[Told, None], wanted: Wanted, metrics: Metrics) -> AsyncGenerator[Told, None]:
    async with aclosing(told):
        async for one in told:
            if isinstance(one, Made):
                metrics.made(wanted, one)
            yield one


async def _all(told: AsyncGenerator[Told, None]) -> list[Made]:
    return sorted([one async for one in told if isinstance(one, Made)], key=lambda made: made.image)


async def _events(told: AsyncGenerator[Told, None], answers: Answers) -> AsyncGenerator[ServerSentEvent, None]:
    """The events of a stream; an error is its last."""
    try:
        async with aclosing(told):
            async for one in told:
                yield answers.event(one)
    except Exception as error:
        yield answers.error(problem_of(error))


async def _unless_gone(request: Request, work: Any) -> Any:
    """What the work gives; None, and its end, as soon as the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class _Stream(EventSourceResponse):
    """A stream that ends without a word where the client does not read it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)
