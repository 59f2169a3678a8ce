"""Errors as OpenAI's JSON: the status, a sentence, and the field that is wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from visar.errors import VisarError, short
from visar.serving.body import NoSuchModel
from visar.serving.jobs import Busy, Closed, Late
from visar.serving.wanted import Broken, Refusal

INVALID, SERVER = "invalid_request_error", "server_error"
LONGEST_NAME = 100  # characters of a field's name that is told


class Problem(NamedTuple):
    """An error for a client."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body, self.status, dict(headers or {}))


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error; the cause of one that is not the client's goes to the log alone."""
    said = str(error)
    match error:
        case Refusal():
            return Problem(400, said, param=error.param, code="invalid_value")
        case NoSuchModel():
            return Problem(404, said, param="model", code="model_not_found")
        case Busy():
            return Problem(429, said, "rate_limit_error", code="queue_full")
        case Closed():
            return Problem(503, said, SERVER, code="shutting_down")
        case Late():
            return Problem(504, said, SERVER, code="deadline_exceeded")
        case Broken():
            logging.getLogger("visar").error("An image failed: %s", said)
            return Problem(500, said, SERVER, code="image_failed")
        case VisarError():
            return Problem(400, said, param="prompt", code="invalid_value")
    logging.getLogger("visar").error("A request failed", exc_info=error)
    return Problem(500, "This failed on the server; its log says why.", SERVER, code="internal_error")


def problem_of_body(errors: Sequence[Any]) -> Problem:
    """The first of pydantic's errors, in a sentence."""
    first = errors[0]
    names = [str(part) for part in first["loc"] if part != "body"]
    kind, name = first["type"], short(names[0], LONGEST_NAME) if names else ""
    if kind == "extra_forbidden":
        return Problem(400, f"Unknown field {name!r}.", param=name, code="unknown_parameter")
    if kind == "json_invalid" or not name:
        return Problem(400, "The body must be a JSON object.", code="invalid_json")
    said = str(first["msg"]).removeprefix("Input should be ")
    return Problem(400, f"{name} must be {short(said)}.", param=name, code="invalid_value")
