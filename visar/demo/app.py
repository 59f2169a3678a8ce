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
from visar.demo.visitors import Visitors, address_of
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

# Boxes give their functions what a browser sends: `checked` says what is wrong with it, where Gradio's own checks would
# end in an HTTP 500.
RAW: dict[str, Any] = dict(preprocess=False, api_visibility="private")
QUICK: dict[str, Any] = dict(queue=False, show_progress="hidden", **RAW)


def theme() -> gr.themes.Base:
    """Fonts of the visitor's machine: the page loads none."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def css() -> str:
    return resources.files("visar.demo").joinpath("page.css").read_text(encoding="utf-8")


def build(models: Mapping[str, DemoModel], limits: Limits) -> gr.Blocks:
    """The page for loaded models; no request of a browser can name a file."""
    desk = Desk(limits)
    page = gr.Blocks(title="visar", analytics_enabled=False)
    visitors = Visitors(page, limits)

    def leave(request: gr.Request) -> None:
        desk.stop(str(request.session_hash))

    with page:
        gr.Markdown(INTRO)
        with gr.Tab("Generate"):
            _generate_tab(models, desk, visitors)
        with gr.Tab("Compare"):
            _compare_tab(models, desk, visitors)
        page.unload(leave)
    page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return page


def _generate_tab(models: Mapping[str, DemoModel], desk: Desk, visitors: Visitors) -> None:
    first = next(iter(models.values()))
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            conditions = Conditions(models, desk.limits)
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            controls = SamplerControls.build(models, "Sampler", first.default_sampler)
            conditions.add_settings(desk.limits)
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

    _wire(desk, visitors, conditions, [controls], go, stop, [status, images, metrics, curves], render)
    _follow(conditions, [(controls, lambda model: model.default_sampler)], status)


def _compare_tab(models: Mapping[str, DemoModel], desk: Desk, visitors: Visitors) -> None:
    first = next(iter(models.values()))
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            conditions = Conditions(models, desk.limits)
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare")
                stop = gr.Button("Stop", variant="stop", elem_id="compare-stop")
            left = SamplerControls.build(models, "First sampler", first.baseline)
            right = SamplerControls.build(models, "Second sampler", first.default_sampler)
            conditions.add_settings(desk.limits)
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

    _wire(desk, visitors, conditions, [left, right], go, stop, [status, ratio, curves, *panes], render)
    _follow(conditions, [(left, lambda model: model.baseline), (right, lambda model: model.default_sampler)], status)


def _wire(
    desk: Desk, visitors: Visitors, conditions: Conditions, controls: list[SamplerControls], go: gr.Button,
    stop: gr.Button, outputs: list[Any], render: Render,
) -> None:  # fmt: skip
    """Connect the buttons: a click checks the request and gives it a ticket at once, then waits for its turn.

    The first of `outputs` is the status.
    """
    tab = str(go.elem_id)
    inputs = [*conditions.components, *(c for control in controls for c in control.components)]

    def ask(request: gr.Request, *values: Any) -> str:
        rest = list(values[len(conditions.components) :])
        samplers = []
        for control in controls:
            own, rest = rest[: len(control.components)], rest[len(control.components) :]
            samplers.append(control.named(own))
        session, address = _who(request)
        try:
            visitors.check(session, address)
            wanted = conditions.request(values[: len(conditions.components)], samplers, desk.limits)
            desk.ask(session, wanted, address, tab)
            return view.status("Waiting for its turn.", "busy")
        except VisarError as error:
            return view.status(str(error), "error")

    def run(request: gr.Request) -> Iterator[list[Any]]:
        yield [gr.skip() for _ in outputs]  # without frames the page does not change
        session = str(request.session_hash)
        if not (name := desk.newest(session, tab)):
            return
        try:
            for shown in render(desk.request(name), desk.serve(name)):
                if visitors.unread(session) > desk.limits.unread:
                    raise Stopped("Stopped, because nobody was looking.")
                yield shown
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

    def full(request: gr.Request) -> Any:
        try:
            visitors.may_wait(*_who(request))
        except VisarError as error:
            return view.status(str(error), "error")
        return view.status("Too many requests are waiting; try again in a while.", "error")

    go.click(ask, inputs, outputs[0], js=SHOW % outputs[0].elem_id, **QUICK).then(
        run, None, outputs, concurrency_id="decode", concurrency_limit=1, show_progress="minimal",
        show_progress_on=outputs[0], **RAW,
    ).failure(full, None, outputs[0], **QUICK)  # fmt: skip
    stop.click(halt, None, outputs[0], **QUICK)


def _who(request: gr.Request) -> tuple[str, str]:
    """The session and the address that a request came from."""
    assert request.request is not None  # as for every request over HTTP
    return str(request.session_hash), address_of(request.request.scope)


def _follow(
    conditions: Conditions, sides: list[tuple[SamplerControls, Callable[[DemoModel], str]]], status: gr.HTML
) -> None:
    """Update the boxes when a model or sampler is chosen; `sides` give the sampler to choose for a new model."""

    def connect(event: Any, update: Callable[..., list[Any]], inputs: list[Any], outputs: list[Any]) -> None:
        """Have `update` give the values of `outputs`; a `VisarError` becomes the status."""

        def told(*values: Any) -> list[Any]:
            try:
                return [gr.skip(), *update(*values)]
            except VisarError as error:
                return [view.status(str(error), "error"), *(gr.skip() for _ in outputs)]

        event(told, inputs, [status, *outputs], **QUICK)

    def of_model(name: Any) -> list[Any]:
        updates = conditions.of_model(name)
        for control, chosen in sides:
            updates += control.of_model(conditions.known(name), chosen(conditions.known(name)))
        return updates

    outputs = [*conditions.dependent, *(c for control, _ in sides for c in control.outputs)]
    connect(conditions.model.input, of_model, [conditions.model], outputs)
    connect(conditions.examples.click, conditions.example, [conditions.examples], [conditions.prompt])
    connect(conditions.dice.click, conditions.another_seed, [], [conditions.settings["seed"]])
    for control, _ in sides:

        def choose(model: Any, sampler: Any, control: SamplerControls = control) -> list[Any]:
            return control.choose(conditions.known(model), sampler)

        connect(control.sampler.input, choose, [conditions.model, control.sampler], control.outputs[1:])
