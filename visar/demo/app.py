"""The page: its layout, and its buttons' events."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from importlib import resources
from typing import Any

import gradio as gr
import torch

from visar.demo import view
from visar.demo.conditions import Conditions
from visar.demo.controls import SamplerControls
from visar.demo.links import opened
from visar.demo.models import DemoModel
from visar.demo.requests import Limits, Request
from visar.demo.runs import Run, Runs, Stopped
from visar.demo.visitors import Visitors, address_of
from visar.demo.words import Speeds
from visar.errors import VisarError
from visar.samplers import values_of
from visar.serving.engine import Engine

INTRO = (
    "<h1>visar</h1><p>Write what to draw, and watch a model make the image piece by piece (each is a token). A sampler "
    "guesses several tokens ahead, and so needs fewer passes of the model. <b>Exact</b> samplers leave every image as "
    "likely as it was, <b>relaxed</b> ones give that up for speed.</p>"
)
# In a narrow window the results are below; the buttons stay in sight.
SHOW = "(...args) => { if (innerWidth < 800) document.getElementById('%s').scrollIntoView(); return args; }"
EMPTY = f"{view.DETAILS}After the first image.</details>"

# The page is shown when its parts have found their places, or after 4 seconds.
HEAD = """<style>
body:not(.visar-ready) .gradio-container { visibility: hidden; animation: visar-show 0s 4s forwards; }
@keyframes visar-show { to { visibility: visible; } }
</style>"""

# Boxes give their functions what a browser sends: `checked` says what is wrong with it, where Gradio's own checks would
# end in an HTTP 500.
RAW: dict[str, Any] = dict(preprocess=False, api_visibility="private")
QUICK: dict[str, Any] = dict(queue=False, show_progress="hidden", **RAW)


def theme() -> gr.themes.Base:
    """Fonts of the visitor's machine: the page loads none. Colours of text have a contrast of 4.5 or more."""
    dim, dim_dark, link = "#4b5563", "#c3c9d4", "#1d4ed8"
    return gr.themes.Soft(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        body_text_color_subdued=dim, body_text_color_subdued_dark=dim_dark, block_info_text_color=dim,
        block_info_text_color_dark=dim_dark, block_label_text_color="#1f2937", block_label_text_color_dark="#e5e7eb",
        block_title_text_color="#1f2937", block_title_text_color_dark="#e5e7eb", input_placeholder_color=dim,
        input_placeholder_color_dark=dim_dark, button_primary_background_fill=link,
        button_primary_background_fill_dark=link, button_primary_background_fill_hover="#1e40af",
        button_primary_background_fill_hover_dark="#1e40af", button_primary_text_color="white",
        button_primary_text_color_dark="white", button_cancel_background_fill="#fee2e2",
        button_cancel_background_fill_dark="#7f1d1d", button_cancel_text_color="#991b1b",
        button_cancel_text_color_dark="#fee2e2", block_label_background_fill="transparent",
        block_title_background_fill="transparent", block_title_background_fill_dark="transparent",
        block_label_background_fill_dark="transparent", link_text_color=link, link_text_color_dark="#93c5fd",
        block_padding="0", block_title_padding="0", block_background_fill="transparent",
        block_background_fill_dark="transparent", input_border_width="1px", input_border_width_dark="1px",
        input_border_color="*neutral_400", input_border_color_dark="*neutral_500", input_shadow="none",
    )  # fmt: skip


def written(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files("visar.demo").joinpath(name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Page:
    """What the events of all tabs share."""

    runs: Runs
    visitors: Visitors
    limits: Limits
    conditions: Conditions
    speeds: Speeds


def build(models: Mapping[str, DemoModel], limits: Limits, engine: Engine) -> gr.Blocks:
    """The page for loaded models; no request of a browser can name a file."""
    blocks, runs = gr.Blocks(title="visar", analytics_enabled=False), Runs(engine, limits)
    first = next(iter(models.values()))

    def leave(request: gr.Request) -> None:
        runs.stop(str(request.session_hash))

    with blocks:
        gr.HTML(INTRO, elem_id="visar-intro")
        with gr.Row(elem_id="visar-page"):
            with gr.Column(scale=2, min_width=300, elem_id="visar-left"):
                conditions = Conditions(models, limits)
                with gr.Column(elem_id="visar-one"):
                    one = SamplerControls(models, "Sampler", first.default_sampler)
                with gr.Accordion("Settings", open=False, elem_id="visar-settings"):
                    conditions.add_settings()
                    with gr.Accordion("Advanced", open=False):
                        conditions.add_advanced()
                        one.add_parameters()
                gr.HTML(view.GALLERY, elem_id="visar-visit")
            with gr.Column(scale=3, min_width=300, elem_id="visar-right"), gr.Tabs():
                page = Page(runs, Visitors(blocks, limits), limits, conditions, Speeds())
                with gr.Tab("Generate"):
                    status = _generate(page, one)
                with gr.Tab("Compare", elem_id="visar-compare"):
                    pair = []
                    with gr.Row():
                        for label, chosen in ("First", first.baseline), ("Second", first.default_sampler):
                            with gr.Column(min_width=200):
                                pair.append(SamplerControls(models, f"{label} sampler", chosen))
                                with gr.Accordion("Advanced", open=False):
                                    pair[-1].add_parameters()
                    _compare(page, pair)
                with gr.Tab("Samplers") as tab:
                    table = gr.HTML(view.samplers(first, page.speeds), elem_id="samplers")
        _follow(page, one, pair, status)
        _links(page, one, pair, status, blocks)

        def told(name: Any) -> str:
            return view.samplers(conditions.known(name), page.speeds) if name in models else ""

        tab.select(told, [conditions.model], [table], **QUICK)
        blocks.unload(leave)
    room = limits.waiting + limits.rows  # no request has less than one image
    blocks.queue(max_size=room, default_concurrency_limit=None, api_open=False)
    runs.warm(list(models.values()))
    return blocks


def _generate(page: Page, one: SamplerControls) -> gr.HTML:
    with gr.Row(elem_id="visar-go"):
        go = gr.Button("Generate", variant="primary", scale=3, elem_id="generate")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    status = gr.HTML(view.status("Press Enter in the prompt, or Generate."), elem_id="status")
    images = gr.HTML(view.images(), elem_id="images")
    gr.HTML(view.SMOOTH)
    result = gr.HTML(view.RESULT, elem_id="result")
    details = gr.HTML(EMPTY, elem_id="details")

    def render(request: Request, runs: list[Run] | None) -> list[Any]:
        if runs is None:
            start = view.status("Starting.", "busy", 0, 1)
            return [start, view.images(size=request.images), view.RESULT, EMPTY, request.seed]
        shown = [view.progress(request, runs, page.runs.engine.queued), view.images(runs)]
        if not all(run.done for run in runs):
            return [*shown, gr.skip(), gr.skip(), gr.skip()]
        return [*shown, view.result(request, runs), view.details(request, runs), request.seed]

    _wire(page, [one], go, stop, [status, images, result, details, page.conditions.settings["seed"]], render)
    return status


def _compare(page: Page, pair: list[SamplerControls]) -> None:
    with gr.Row(elem_id="visar-race-go"):
        go = gr.Button("Start the race", variant="primary", scale=3, elem_id="compare")
        stop = gr.Button("Stop", variant="stop", elem_id="compare-stop")
    status = gr.HTML(view.status("Two samplers, one prompt and one seed: who is done first?"), elem_id="compare-status")
    with gr.Row(elem_classes="visar-race"):
        columns = [gr.HTML(view.start(control.chosen), elem_id=f"racer-{n}") for n, control in enumerate(pair)]
    details = gr.HTML(view.LATER, elem_id="compare-details")

    def render(request: Request, runs: list[Run] | None) -> list[Any]:
        if runs is None:
            start = view.status("Starting.", "busy", 0, 1)
            return [start, *(view.racer(request, None, n) for n in (0, 1)), view.LATER, request.seed]
        first, done = view.first_of(runs), all(run.done for run in runs)
        racers = [view.racer(request, run, run.number, first) for run in runs]
        rest = [view.race_details(request, runs), request.seed] if done else [gr.skip(), gr.skip()]
        return [view.race(request, runs), *racers, *rest]

    _wire(page, pair, go, stop, [status, *columns, details, page.conditions.settings["seed"]], render)


def _wire(
    page: Page, controls: list[SamplerControls], go: gr.Button, stop: gr.Button, outputs: list[Any],
    render: Callable[[Request, list[Run] | None], list[Any]],
) -> None:  # fmt: skip
    """Connect the buttons. `render` gives the outputs, of which the first is the status; without runs, at the start."""
    conditions = page.conditions
    inputs = [*conditions.components, *(c for control in controls for c in control.components)]

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        session, rest, samplers = str(request.session_hash), list(values[len(conditions.components) :]), []
        for control in controls:
            own, rest = rest[: len(control.components)], rest[len(control.components) :]
            samplers.append(control.named(own))
        try:
            wanted = conditions.request(values[: len(conditions.components)], samplers, images=len(controls) == 1)
            yield render(wanted, None)
            async with aclosing(page.runs.serve(session, wanted)) as frames:  # type: ignore[type-var]
                async for runs in frames:
                    if page.visitors.unread(session) > page.limits.unread:
                        raise Stopped("Stopped, because nobody was looking.")
                    yield render(wanted, runs)
            for made in runs:
                found = view.finished(made)
                page.speeds.add(wanted.model.name, wanted.samplers[made.number].name, found.nfe, found.seconds)
        except Stopped as stopped:
            yield only_status(view.status(str(stopped)))
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
        return gr.skip() if page.runs.stop(str(request.session_hash)) else view.status("There is nothing to stop.")

    def full(request: gr.Request) -> Any:
        assert request.request is not None  # as for every request over HTTP
        try:
            page.visitors.may_ask(str(request.session_hash), address_of(request.request.scope))
        except VisarError as error:
            return view.status(str(error), "error")
        return view.status("Too many requests are waiting; try again in a while.", "error")

    triggers = [go.click] + ([conditions.prompt.submit] if len(controls) == 1 else [])
    place = "visar-go" if len(controls) == 1 else "visar-race-go"
    gr.on(triggers, run, inputs, outputs, js=SHOW % place, show_progress="hidden", **RAW).failure(
        full, None, outputs[0], **QUICK
    )
    stop.click(halt, None, outputs[0], **QUICK)


def _told(
    event: Any, update: Callable[..., list[Any]], inputs: list[Any], outputs: list[Any], status: gr.HTML, **more: Any
) -> None:  # fmt: skip
    """Have `update` give the values of `outputs`; a `VisarError` becomes the status."""

    def told(*values: Any) -> list[Any]:
        try:
            return [gr.skip(), *update(*values)]
        except VisarError as error:
            return [view.status(str(error), "error"), *(gr.skip() for _ in outputs)]

    event(told, inputs, [status, *outputs], **QUICK, **more)


def _follow(page: Page, one: SamplerControls, pair: list[SamplerControls], status: gr.HTML) -> None:
    """Update the boxes when a model or sampler is chosen."""
    conditions, controls = page.conditions, [one, *pair]

    def of_model(name: Any) -> list[Any]:
        model = conditions.known(name)
        updates = conditions.of_model(name)
        defaults = model.default_sampler, model.baseline, model.default_sampler
        for control, chosen in zip(controls, defaults, strict=True):
            updates += control.of_model(model, chosen)
        return updates

    outputs = [*conditions.dependent, *(c for control in controls for c in control.outputs)]
    _told(conditions.model.input, of_model, [conditions.model], outputs, status)
    for control in controls:

        def choose(model: Any, sampler: Any, control: SamplerControls = control) -> list[Any]:
            return control.choose(conditions.known(model), sampler)

        _told(control.sampler.input, choose, [conditions.model, control.sampler], control.outputs[1:], status)


def _links(page: Page, one: SamplerControls, pair: list[SamplerControls], status: gr.HTML, blocks: gr.Blocks) -> None:
    """Fill the boxes from the address that the page was opened with."""
    conditions, query = page.conditions, gr.Textbox(visible=False)
    outputs = [*conditions.components, *(c for control in [one, *pair] for c in control.outputs)]

    def fill(text: Any) -> list[Any]:
        if (found := opened(text, conditions.models, page.limits)) is None:
            return [gr.skip() for _ in outputs]
        request, race = found
        model, names = request.model, [s.name for s in request.samplers]
        parameters = {} if race else values_of(request.samplers[0])
        chosen = [model.default_sampler, *names] if race else [names[0], model.baseline, model.default_sampler]
        updates = conditions.of_request(request)
        # Whether a box is there depends on the model.
        for box, update in zip(conditions.dependent, conditions.of_model(model.name), strict=True):
            at = conditions.components.index(box) if box in conditions.components else None
            if at is not None:
                given = updates[at] if isinstance(updates[at], dict) else {"value": updates[at]}
                updates[at] = {**update, **given}
        for control, name in zip([one, *pair], chosen, strict=True):
            updates += control.of_model(model, name, parameters if control is one else {})
        return updates

    _told(blocks.load, fill, [query], outputs, status, js="() => location.search")
