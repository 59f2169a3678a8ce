"""What is made, in the words of OpenAI's API; what only visar says of it is in an object `visar`."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from visar.params import ORDERS, TAKES
from visar.serving.body import SETTINGS
from visar.serving.problems import Problem
from visar.serving.wanted import Accepted, Made, ModelCard, Preview, Told, Wanted


def model_object(card: ModelCard, since: int) -> dict[str, Any]:
    """A model of `GET /v1/models`; `since` is a Unix time."""
    samplers = {
        name: {"exactness": s.exactness, "window": s.window, "parameters": dict(s.parameters)}
        for name, s in card.samplers.items()
    }
    about = {
        "condition": card.condition, "size": card.size, "tokens": card.length, "dtype": card.dtype,
        "default_sampler": card.sampler, "samplers": samplers,
    }  # fmt: skip
    if card.condition == "class":
        about["classes"] = card.classes
    if "order" in TAKES.get(card.scan, ()):
        about["orders"] = list(ORDERS)
    return {"id": card.name, "object": "model", "created": since, "owned_by": "visar", "visar": about}


class Answers:
    """The answers to one request."""

    def __init__(self, wanted: Wanted, card: ModelCard, accepted: Accepted):
        self.wanted, self.card, self.accepted = wanted, card, accepted
        self._previews: Counter[int] = Counter()

    def whole(self, made: Sequence[Made]) -> dict[str, Any]:
        """The answer without a stream."""
        return {
            "created": int(time.time()), "background": "opaque", "output_format": self.wanted.form,
            "size": self.card.size, "data": [{"b64_json": _text(one.file)} for one in made],
            "usage": self._usage(len(made)), "visar": self._about(made),
        }  # fmt: skip

    def event(self, told: Told) -> ServerSentEvent:
        """An event of a stream."""
        assert not isinstance(told, Accepted)
        kind = "image_generation.partial_image" if isinstance(told, Preview) else "image_generation.completed"
        found: dict[str, Any] = {
            "type": kind, "b64_json": _text(told.file), "created_at": int(time.time()), "size": self.card.size,
            "quality": "auto", "background": "opaque", "output_format": self.wanted.form,
        }  # fmt: skip
        if isinstance(told, Preview):
            found |= {"partial_image_index": self._previews[told.image], "visar": {"image": told.image}}
            self._previews[told.image] += 1
        else:
            found |= {"usage": self._usage(1), "visar": self._about([told])}
        return ServerSentEvent(json.dumps(found), event=kind)

    def error(self, problem: Problem) -> ServerSentEvent:
        """The event of a stream that ends without all of its images."""
        return ServerSentEvent(json.dumps({"type": "error", **problem.body}), event="error")

    def _usage(self, images: int) -> dict[str, Any]:
        """Tokens of the images; those of prompts are not counted."""
        count = images * self.card.length
        return {
            "input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens": count, "total_tokens": count,
        }  # fmt: skip

    def _about(self, made: Sequence[Made]) -> dict[str, Any]:
        sampler, params = self.card.samplers[self.wanted.sampler], self.accepted.params
        return {
            "model": self.card.name, "sampler": self.wanted.sampler, "exactness": sampler.exactness,
            "window": sampler.window, "dtype": self.card.dtype, "invariant": bool(params.invariant),
            **{name: getattr(params, name) for name in SETTINGS},
            "images": [
                {
                    "image": one.image, "passes": one.passes, "nfe": one.nfe,
                    "queue_seconds": round(one.waited, 4), "seconds": round(one.seconds, 4),
                }
                for one in made
            ],
            "notes": list(self.accepted.notes),
        }  # fmt: skip


def _text(file: bytes) -> str:
    return base64.b64encode(file).decode()
