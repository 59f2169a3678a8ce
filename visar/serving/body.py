"""The body of `POST /v1/images/generations`, as OpenAI has it and with visar's settings, and what it asks for."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from visar.errors import VisarError, unknown
from visar.params import ORDERS, SCHEDULES, SamplingParams
from visar.serving.wanted import ModelCard, Refusal, Wanted

SETTINGS = ("seed", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "order")
MOST_PREVIEWS = 3


class NoSuchModel(VisarError):
    """A model that is not served."""


class ImagesBody(BaseModel):
    """Images to be made of a prompt, or of a class of a class-conditional model. Nothing in it is a path or a URL."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    prompt: str | None = Field(None, description="what the image shows; for models of classes leave it out")
    model: str | None = Field(None, description="a name of /v1/models (default: the first)")
    n: int | None = Field(None, description="images, of which number i is image i of `visar generate`")
    size: str | None = Field(None, description="auto, or the size that the model has")
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json; there are no URLs")
    output_format: Literal["png", "webp", "jpeg"] | None = Field(None, description="png and webp keep every pixel")
    stream: bool | None = Field(None, description="send server-sent events")
    partial_images: Annotated[int, Field(ge=0, le=MOST_PREVIEWS)] | None = Field(
        None, description="images sent before each is done, at most; with stream"
    )
    user: str | None = Field(None, description="not used")
    seed: int | None = Field(None, description="of all random numbers (default: drawn, and returned)")
    guidance_scale: float | None = None
    guidance_schedule: str | None = Field(None, json_schema_extra={"enum": [*SCHEDULES, None]})
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    order: str | None = Field(
        None, description="of the tokens, for models that take any", json_schema_extra={"enum": [*ORDERS, None]}
    )
    sampler: str | None = Field(None, description="one of those that run for the model")
    class_label: int | None = Field(None, description="for models of classes")

    def wanted(self, cards: Mapping[str, ModelCard], *, most_images: int, seconds: float) -> Wanted:
        """What is asked for. Raises `Refusal`, and `NoSuchModel`."""
        card = self._card(cards)
        if self.response_format == "url":
            raise Refusal("response_format", "response_format must be b64_json: this server keeps no files.")
        if self.size not in (None, "auto", card.size):
            raise Refusal("size", f"size must be auto or {card.size}, which {card.name} makes, not {self.size!r}.")
        count = 1 if self.n is None else self.n
        if not 1 <= count <= most_images:
            raise Refusal("n", f"n must be from 1 to {most_images}, not {count}.")
        if self.partial_images and not self.stream:
            raise Refusal("partial_images", "partial_images are sent with stream true only.")
        sampler = card.sampler if self.sampler is None else self.sampler
        if sampler not in card.samplers:
            raise Refusal("sampler", unknown(f"sampler of {card.name}", sampler, card.samplers))
        return Wanted(
            card.name, sampler, self._condition(card), self._params(card), tuple(range(count)),
            self.output_format or "png", self.partial_images or 0, seconds,
        )  # fmt: skip

    def _card(self, cards: Mapping[str, ModelCard]) -> ModelCard:
        name = next(iter(cards)) if self.model is None else self.model
        if name not in cards:
            raise NoSuchModel(unknown("model", name, cards))
        return cards[name]

    def _condition(self, card: ModelCard) -> str | int:
        if card.condition == "class":
            if self.prompt:
                raise Refusal("prompt", f"{card.name} takes class_label, 0 to {card.classes - 1}, and no prompt.")
            if self.class_label is None:
                raise Refusal("class_label", f"class_label must be given, 0 to {card.classes - 1}.")
            if not 0 <= self.class_label < card.classes:
                raise Refusal(
                    "class_label", f"class_label must be from 0 to {card.classes - 1}, not {self.class_label}."
                )
            return self.class_label
        if self.class_label is not None:
            raise Refusal("class_label", f"{card.name} takes a prompt, and no class_label.")
        if self.prompt is None or not self.prompt.strip():
            raise Refusal("prompt", "The prompt is empty; give at least one word.")
        return self.prompt

    def _params(self, card: ModelCard) -> SamplingParams:
        found: dict[str, Any] = {"seed": secrets.randbits(32)}
        if self.guidance_scale not in (None, 1.0) and not card.guided:
            raise Refusal("guidance_scale", f"{card.name} has no guidance; leave guidance_scale out, or give 1.")
        for name in SETTINGS:
            if (value := getattr(self, name)) is None:
                continue
            try:
                SamplingParams(**{name: value}).check(card.tokens, card.scan)
            except VisarError as error:
                raise Refusal(name, error) from error
            found[name] = value
        return SamplingParams(**found)
