"""The page: its layout, and its buttons' events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

import gradio as gr
import torch

from visar.demo import view
from visar.demo.conditions import Conditions
from visar.demo.controls import SamplerControls
from visar.demo.desk import Desk
from visar.demo.jobs import Frame, Stopped
from visar.demo.models import DemoModel
from visar.demo.requests import Limits, Request
from visar.errors import VisarError

INTRO = (
    "# visar\nImage autoregressive models, decoded in fewer passes of the network. Grey cells are not sampled yet. "
    "An **exact** sampler samples from the same distribution as plain decoding; a **relaxed** one "
    "does not."
)

# In a narrow window the results are far below the button.
SHOW = "(...args) => { if (innerWidth < 800) document.getElementById('%s').scrollIntoView(); return args; }"

Frames = Iterator[tuple[int, Frame]]
Render = Callable[[Request, Frames], Iterator[list[Any]]]  # values of the page's outputs for each frame


def theme() -> gr.themes.Base:
    """Fonts of the visitor's machine: the page loads none."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def css() -> str:
    return resources.files("visar.demo").joinpath("page.css").read_text(encoding="utf-8")


def build(models: Mapping[str, DemoModel], limits: Limits) -> gr.Blocks:
    """The page for loaded models; no request of a browser can name a file."""
    desk = Desk(limits)

    def leave(request: gr.Request) -> None:
        desk.stop(str(request.session_hash))

    with gr.Blocks(title="visar", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Tab("Generate"):
            _generate_tab(models, limits, desk)
        with gr.Tab("Compare"):
            _compare_tab(models, limits, desk)
        page.unload(leave)
    page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return page


def _generate_tab(models: Mapping[str, DemoModel], limits: Limits, desk: Desk) -> None:
    first = next(iter(models.values()))
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            conditions = Conditions(models, limits)
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            controls = SamplerControls.build(models, "Sampler", first.default_sampler)
            conditions.add_settings(limits)
        with gr.Column(scale=3, min_width=320, elem_classes="visar-results"):
            status = gr.HTML(view.status("Ready."), elem_id="status")
            images = gr.HTML(view.images(None, None), elem_id="images")
            metrics = gr.HTML(elem_id="metrics")
            curves = gr.HTML(elem_id="curves")

    def render(request: Request, frames: Frames) -> Iterator[list[Any]]:
        (label,) = request.labels
        for _, frame in frames:
            yield [
                view.progress(label, frame),
                view.images(request, frame),
                view.metrics(frame.stats),
                view.curves({label: frame}, request.tokens),
            ]

    _wire(desk, limits, conditions, [controls], go, stop, [status, images, metrics, curves], render)
    _follow(conditions, [(controls, lambda model: model.default_sampler)])


def _compare_tab(models: Mapping[str, DemoModel], limits: Limits, desk: Desk) -> None:
    first = next(iter(models.values()))
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            conditions = Conditions(models, limits)
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare")
                stop = gr.Button("Stop", variant="stop", elem_id="compare-stop")
            left = SamplerControls.build(models, "First sampler", first.baseline)
            right = SamplerControls.build(models, "Second sampler", first.default_sampler)
            conditions.add_settings(limits)
        with gr.Column(scale=3, min_width=320, elem_classes="visar-results"):
            status = gr.HTML(
                view.status("Ready. Both samplers get the same prompt and seed."), elem_id="compare-status"
            )
            ratio = gr.HTML(elem_id="compare-ratio")
            curves = gr.HTML(elem_id="compare-curves")
            panes = []
            with gr.Row():
                for side in ("left", "right"):
                    with gr.Column(min_width=280):
                        panes += [gr.HTML(elem_id=f"compare-{what}-{side}") for what in ("images", "metrics")]

    def render(request: Request, frames: Frames) -> Iterator[list[Any]]:
        last: dict[str, Frame] = {}
        for number, frame in frames:
            label = request.labels[number]
            last[label] = frame
            most = max(f.most for f in last.values())  # one scale of colours for both
            shown: list[Any] = [view.progress(label, frame, last), view.ratio(last), view.curves(last, request.tokens)]
            for name in request.labels:
                now = last.get(name)
                shown += [view.images(request, now, name, most), view.metrics(now.stats if now else None)]
            yield shown

    _wire(desk, limits, conditions, [left, right], go, stop, [status, ratio, curves, *panes], render)
    _follow(conditions, [(left, lambda model: model.baseline), (right, lambda model: model.default_sampler)])


def _wire(
    desk: Desk, limits: Limits, conditions: Conditions, controls: list[SamplerControls], go: gr.Button, stop: gr.Button,
    outputs: list[Any], render: Render,
) -> None:  # fmt: skip
    """Connect the buttons: a click checks the request and gives it a ticket at once, then waits for its turn.

    The first of `outputs` is the status.
    """
    ticket = gr.State("")
    inputs = [*conditions.components, *(c for control in controls for c in control.components)]

    def ask(request: gr.Request, *values: Any) -> tuple[str, str]:
        rest = list(values[len(conditions.components) :])
        samplers = []
        for control in controls:
            own, rest = rest[: len(control.components)], rest[len(control.components) :]
            samplers.append(control.named(own))
        try:
            wanted = conditions.request(values[: len(conditions.components)], samplers, limits)
            return desk.ask(str(request.session_hash), wanted), view.status("Waiting for its turn.", "busy")
        except VisarError as error:
            return "", view.status(str(error), "error")

    def run(name: str) -> Iterator[list[Any]]:
        yield [gr.skip() for _ in outputs]  # without frames the page does not change
        if not name:
            return
        try:
            wanted = desk.request(name)
            yield from render(wanted, desk.serve(name))
        except Stopped as stopped:
            yield only_status(view.status(str(stopped), "info"))
        except VisarError as error:
            yield only_status(view.status(str(error), "error"))
        except torch.OutOfMemoryError:
            yield only_status(view.status("The device has too little memory for this; ask for fewer images.", "error"))
        except Exception as error:
            logging.getLogger("visar").exception("A request failed")
            what = f"This failed on the server ({type(error).__name__}); its log says why."
            yield only_status(view.status(what, "error"))

    def only_status(text: str) -> list[Any]:
        return [text, *(gr.skip() for _ in outputs[1:])]

    def halt(request: gr.Request) -> Any:
        match desk.stop(str(request.session_hash)):
            case "work":
                return gr.skip()  # the request reports where it stopped
            case "waiting":
                return view.status("Cancelled before it began.")
            case _:
                return view.status("There is nothing to stop.")

    def full() -> str:
        return view.status("Too many requests are waiting; try again in a while.", "error")

    quick: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
    go.click(ask, inputs, [ticket, outputs[0]], js=SHOW % outputs[0].elem_id, **quick).then(
        run, ticket, outputs, concurrency_id="decode", concurrency_limit=1, api_visibility="private",
        show_progress="minimal", show_progress_on=outputs[0],
    ).failure(full, None, outputs[0], **quick)  # fmt: skip
    stop.click(halt, None, outputs[0], **quick)


def _follow(conditions: Conditions, sides: list[tuple[SamplerControls, Callable[[DemoModel], str]]]) -> None:
    """Update the boxes when a model or sampler is chosen; `sides` give the sampler to choose for a new model."""
    quick: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")

    def of_model(name: str) -> list[Any]:
        updates = conditions.of_model(name)
        for control, chosen in sides:
            updates += control.of_model(name, chosen(conditions.models[name]))
        return updates

    outputs = [*conditions.dependent, *(c for control, _ in sides for c in control.outputs)]
    conditions.model.input(of_model, conditions.model, outputs, **quick)
    for control, _ in sides:
        control.sampler.input(control.choose, [conditions.model, control.sampler], control.outputs[1:], **quick)
