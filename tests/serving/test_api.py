"""The HTTP API over real sockets: its images are those of the command line, and each bad request gets a sentence."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import visar
from tests.helpers import tiny_glm, tiny_hf
from tests.helpers.api import JSON, Api, serving
from tests.helpers.tiny import VQ
from visar.cli import main
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.vq import VQModel
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.serving.app import ROUTE
from visar.serving.replica import encoded


@pytest.fixture(scope="module")
def api(text_folder: Path, class_folder: Path) -> Iterator[Api]:
    text = TextToImagePipeline.from_pretrained(text_folder)
    classes = ClassToImagePipeline.from_pretrained(class_folder)
    with serving(("text", text, ("scd", "ar", "zipar")), ("class", classes, ("scd",)), most_images=4) as served:
        yield served


def generated(folder: Path, where: Path, *options: object) -> list[bytes]:
    """The files of `visar generate`, without their texts about how they were made."""
    words = ["generate", "--model", folder, "--dtype", "float32", "--seed", 5, "-o", f"{where}/", *options]
    assert main([str(word) for word in words]) == 0
    files = sorted(where.glob("*.png"), key=lambda file: (len(file.name), file.name))
    return [encoded(lambda file=file: Image.open(file), "png") for file in files]  # type: ignore[misc]


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


# Images


@pytest.mark.parametrize("sampler", ["scd", "ar", "zipar"])
def test_images_are_the_files_of_generate(api: Api, text_folder: Path, tmp_path: Path, sampler: str) -> None:
    settings = ("--sampler", sampler, "--temperature", 0.9, "--top-k", 9, "--guidance-scale", 3)
    wanted = generated(text_folder, tmp_path, "red heart", "-n", 3, *settings)
    answer = api.images(
        prompt="red heart", model="text", n=3, seed=5, sampler=sampler, temperature=0.9, top_k=9, guidance_scale=3
    )
    assert answer.files == wanted and len(set(wanted)) == 3
    told = answer.json
    assert (told["size"], told["output_format"], told["background"]) == ("10x10", "png", "opaque")
    about = told["visar"]
    exactness = "relaxed" if sampler == "zipar" else "exact"
    assert (about["sampler"], about["exactness"], about["seed"], about["temperature"]) == (sampler, exactness, 5, 0.9)
    assert [one["image"] for one in about["images"]] == [0, 1, 2] and about["notes"] == []
    assert all(1 <= one["passes"] <= 25 and one["nfe"] >= one["passes"] for one in about["images"])
    assert told["usage"]["output_tokens"] == 75


def test_images_of_a_class(api: Api, class_folder: Path, tmp_path: Path) -> None:
    wanted = generated(class_folder, tmp_path, "--class", 3, "-n", 2)
    assert api.images(class_label=3, model="class", n=2, seed=5).files == wanted


def test_the_invariant_mode(text_folder: Path, tmp_path: Path) -> None:
    """In bfloat16 the bytes are the same, too, though rows are decoded next to others."""
    wanted = generated(text_folder, tmp_path, "red heart", "-n", 2, "--dtype", "bfloat16", "--invariant")
    pipe = TextToImagePipeline.from_pretrained(text_folder).to(dtype=torch.bfloat16)
    with serving(("text", pipe, ("scd",)), invariant=True) as api:
        answer = api.images(prompt="red heart", n=2, seed=5)
    assert answer.files == wanted and answer.json["visar"]["invariant"] and answer.json["visar"]["dtype"] == "bfloat16"


def test_an_order(tmp_path: Path) -> None:
    """Requests in one pool have orders and schedules of their own; each gets the files of `visar generate`."""
    folder = tmp_path / "any"
    torch.manual_seed(3)
    gpt = RandAR(vocab_size=24, dim=32, num_layers=1, num_heads=2, ffn=48, classes=7, grid=5)
    torch.nn.init.normal_(gpt.output.weight, std=0.3)
    ClassToImagePipeline(gpt=gpt, vq=VQModel(**VQ)).save_pretrained(folder)
    pipe = ClassToImagePipeline.from_pretrained(folder)
    with serving(("any", pipe, ("scd",))) as api:
        asked: list[dict[str, str]] = [{}, {"order": "halton"}, {"order": "raster", "guidance_schedule": "constant"}]
        waiting = [api.later(class_label=3, seed=5, **more) for more in asked]
        answers = [one.answer for one in waiting]
        (model,) = api.ask("/v1/models").json["data"]
        bad = api.images(class_label=3, order="spiral")
    assert model["visar"]["orders"] == ["raster", "random", "halton", "farthest-point", "locality"]
    assert (bad.status, bad.error["param"]) == (400, "order") and "order must be raster or random" in bad.error[
        "message"
    ]
    assert [a.json["visar"]["order"] for a in answers] == ["random", "halton", "raster"]
    for number, (answer, more) in enumerate(zip(answers, asked, strict=True)):
        options = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", value)]
        assert answer.files == generated(folder, tmp_path / str(number), "--class", 3, *options)
    assert len({answer.files[0] for answer in answers}) == 3


def test_formats(api: Api) -> None:
    png, webp, jpeg = (
        api.images(prompt="red heart", seed=5, output_format=form).files[0] for form in ("png", "webp", "jpeg")
    )
    assert pixels(webp) == pixels(png) and Image.open(io.BytesIO(webp)).format == "WEBP"
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"


def test_a_seed_that_was_drawn_is_returned(api: Api) -> None:
    first, second = api.images(prompt="cat"), api.images(prompt="cat", n=None, user="me", quality="auto", size="auto")
    seeds = [answer.json["visar"]["seed"] for answer in (first, second)]
    assert seeds[0] != seeds[1]
    assert api.images(prompt="cat", seed=seeds[1]).files == second.files


def test_words_that_are_left_out_are_told(api: Api) -> None:
    answer = api.images(prompt="red zebra", seed=1)
    assert answer.json["visar"]["notes"] == ["Words not known to this model were left out: zebra."]


@pytest.mark.parametrize(("sampler", "count"), [("ar", 3), ("ar", 0), ("scd", 2), ("zipar", 1)])
def test_a_stream(api: Api, sampler: str, count: int) -> None:
    asked: dict[str, Any] = {"prompt": "red heart", "seed": 5, "sampler": sampler, "n": 2}
    answer = api.images(**asked, stream=True, partial_images=count)
    assert answer.headers["content-type"].startswith("text/event-stream")
    whole = api.images(**asked).files
    for number in (0, 1):
        *partial, last = [event for event in answer.events if _image_of(event) == number]
        assert last["type"] == "image_generation.completed" and base64.b64decode(last["b64_json"]) == whole[number]
        assert last["visar"]["seed"] == 5 and last["usage"]["output_tokens"] == 25
        assert [event["type"] for event in partial] == ["image_generation.partial_image"] * len(partial)
        assert [event["partial_image_index"] for event in partial] == list(range(len(partial)))
        assert len(partial) <= count
        known = [_known(base64.b64decode(event["b64_json"]), whole[number]) for event in partial]
        assert known == sorted(set(known))
        if sampler == "ar":
            assert len(partial) == count


def _image_of(event: dict[str, Any]) -> int:
    about = event["visar"]
    return int(about["image"] if "image" in about else about["images"][0]["image"])


def _known(partial: bytes, whole: bytes) -> int:
    """Pixels that are not grey."""
    found = pixels(partial)
    assert Image.open(io.BytesIO(partial)).size == Image.open(io.BytesIO(whole)).size
    return sum(found[i : i + 3] != b"\x80\x80\x80" for i in range(0, len(found), 3))


# Bad input

BAD = [
    (b"", "JSON object"), (b"{", "JSON object"), (b"[]", "JSON object"), (b"\xff", "JSON object"),
    (b'{"prompt": "cat", "seed": 1, "seed": 2}', "it has 'seed' twice"),
    (b"[" * 60_000, "JSON object"), (b'{"n": ' + b"9" * 9000 + b"}", "JSON object"),
    ({}, "prompt is empty", "prompt"), ({"prompt": " "}, "prompt is empty", "prompt"),
    ({"prompt": "zebra"}, "No word of the prompt 'zebra' is known", "prompt"),
    ({"prompt": "\ud800"}, "no valid text", "prompt"), ({"prompt": 5}, "must be a valid string", "prompt"),
    ({"prompt": ["cat"]}, "must be a valid string", "prompt"),
    ({"prompt": "cat", "n": 0}, "n must be from 1 to 4, not 0.", "n"),
    ({"prompt": "cat", "n": 10**6}, "n must be from 1 to 4, not 1000000.", "n"),
    ({"prompt": "cat", "n": True}, "n must be", "n"), ({"prompt": "cat", "n": "2"}, "n must be", "n"),
    ({"prompt": "cat", "size": "1024x1024"}, "size must be auto or 10x10", "size"),
    ({"prompt": "cat", "response_format": "url"}, "must be b64_json", "response_format"),
    ({"prompt": "cat", "output_format": "gif"}, "output_format must be 'png', 'webp' or 'jpeg'", "output_format"),
    ({"prompt": "cat", "partial_images": 1}, "with stream true only", "partial_images"),
    ({"prompt": "cat", "stream": True, "partial_images": 4}, "less than or equal to 3", "partial_images"),
    ({"prompt": "cat", "image_url": "http://127.0.0.1"}, "Unknown field 'image_url'.", "image_url"),
    ({"prompt": "cat", "style": "vivid"}, "Unknown field 'style'.", "style"),
    ({"prompt": "cat", "seed": -1}, "seed must be from 0", "seed"),
    ({"prompt": "cat", "seed": 2**64}, "seed must be from 0", "seed"),
    ({"prompt": "cat", "temperature": 0}, "temperature must be above 0", "temperature"),
    (b'{"prompt": "cat", "temperature": NaN}', "must be a finite number", "temperature"),
    ({"prompt": "cat", "top_p": 0}, "top_p must be above 0", "top_p"),
    ({"prompt": "cat", "top_k": -1}, "top_k must be 0 or more", "top_k"),
    ({"prompt": "cat", "guidance_scale": 1e39}, "guidance_scale must be from", "guidance_scale"),
    ({"prompt": "cat", "order": "halton"}, "order is for models that were trained to sample in any order", "order"),
    ({"prompt": "cat", "order": ["halton"]}, "order must be", "order"),
    ({"prompt": "cat", "guidance_schedule": "linear"}, "is for models of continuous tokens", "guidance_schedule"),
    ({"prompt": "cat", "sampler": "sjd"}, "Unknown sampler of text 'sjd'", "sampler"),
    ({"prompt": "cat", "sampler": "x.py:Mine"}, "Unknown sampler of text 'x.py:Mine'", "sampler"),
    ({"prompt": "cat", "class_label": 1}, "takes a prompt", "class_label"),
    ({"model": "class", "prompt": "cat"}, "takes class_label, 0 to 6", "prompt"),
    ({"model": "class"}, "class_label must be given", "class_label"),
    ({"model": "class", "class_label": 7}, "must be from 0 to 6, not 7", "class_label"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: str(case[0])[:40])
def test_bad_bodies(api: Api, case: tuple[Any, ...]) -> None:
    """One sentence, and the field; a stream is refused before it begins."""
    body, said, *param = case
    for more in ({}, {"stream": True}):
        if isinstance(body, bytes) and more:
            continue
        text = body if isinstance(body, bytes) else json.dumps({**more, **body}).encode()
        if "stream true only" in said and more:
            continue
        answer = api.ask(ROUTE, text, JSON)
        assert answer.status == 400 and said in answer.error["message"], answer.body
        assert answer.error["param"] == (param[0] if param else None) and len(answer.body) < 2000
    assert api.engine.counts.failed == 0


def test_prompts_and_guidance_that_a_model_of_transformers_does_not_take() -> None:
    """Its own prompt and setting are wrong, so it is 400, and nobody who is decoded with it is lost."""
    janus, glm = visar.accelerate(*tiny_hf.janus()), visar.accelerate(*tiny_glm.glm())
    long = " ".join(["cat"] * 600)
    with serving(("janus", janus, ("scd", "zipar")), ("glm", glm, ("scd",))) as api:
        for sampler in ("scd", "zipar"):
            answer = api.images(prompt=long, sampler=sampler)
            assert (answer.status, answer.error["param"]) == (400, "prompt")
            assert "at most 496" in answer.error["message"]
        answer = api.images(model="glm", prompt="a <|image|> cat")
        assert (answer.status, answer.error["param"]) == (400, "prompt") and "leave it out" in answer.error["message"]
        answer = api.images(model="glm", prompt="cat", guidance_scale=3.0)
        assert (answer.status, answer.error["param"]) == (400, "guidance_scale") and api.engine.counts.failed == 0


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
def test_a_head_is_answered_as_a_get(api: Api, path: str) -> None:
    head, whole = (api.ask(path, method=method) for method in ("HEAD", "GET"))
    assert head.status == whole.status == 200 and whole.body and not head.body


def test_the_schema_names_each_route_once(api: Api, recwarn: pytest.WarningsRecorder) -> None:
    found = [
        route for methods in json.loads(api.ask("/openapi.json").body)["paths"].values() for route in methods.items()
    ]
    assert len({about["operationId"] for _, about in found}) == len(found) == 6
    assert sorted(method for method, _ in found) == ["get"] * 5 + ["post"] and not list(recwarn)


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/models/nix", "GET", 404), ("/nix", "GET", 404), ("/", "GET", 404), ("/v1/images/edits", "POST", 404),
        ("/docs", "GET", 404), ("/v1/models/", "GET", 404),
        (f"{ROUTE}/", "POST", 404), (ROUTE, "GET", 405), ("/v1/models", "DELETE", 405), ("/health", "POST", 405),
    ],
)  # fmt: skip
def test_wrong_places(api: Api, path: str, method: str, status: int) -> None:
    answer = api.ask(path, b"{}" if method == "POST" else None, JSON, method)
    assert answer.status == status and answer.error["type"] == "invalid_request_error"
    if status == 405:
        assert answer.headers["allow"] == ("POST" if path == ROUTE else "GET, HEAD")


def test_fields_in_the_address(api: Api) -> None:
    answer = api.ask(f"{ROUTE}?seed=5", b'{"prompt": "cat"}', JSON)
    assert answer.status == 400 and answer.error["message"] == "Fields are sent in the body; the address has 'seed'."
    assert (answer.error["param"], answer.error["code"]) == ("seed", "unknown_parameter")


def test_an_unknown_model(api: Api) -> None:
    answer = api.images(prompt="cat", model="../../etc/passwd")
    assert answer.status == 404 and (answer.error["param"], answer.error["code"]) == ("model", "model_not_found")


# What else there is


def test_models(api: Api) -> None:
    text, classes = api.ask("/v1/models").json["data"]
    assert (text["id"], text["object"], text["owned_by"]) == ("text", "model", "visar")
    assert text["visar"]["size"] == "10x10" and list(text["visar"]["samplers"]) == ["scd", "ar", "zipar"]
    assert classes["visar"]["classes"] == 7
    assert api.ask("/v1/models/class").json == classes


def test_metrics(api: Api) -> None:
    before = _metrics(api)
    api.images(prompt="cat", n=2, sampler="ar")
    now = _metrics(api)
    for name, more in (
        ("visar_images_total{outcome=\"finished\"}", 2), ("visar_tokens_total", 50), ("visar_passes_total", 25),
        ("visar_row_passes_total", 50), ("visar_image_seconds_count{model=\"text\",sampler=\"ar\"}", 2),
        ("visar_image_passes_sum{model=\"text\",sampler=\"ar\"}", 50),
        ("visar_image_queue_seconds_count{model=\"text\",sampler=\"ar\"}", 2),
    ):  # fmt: skip
        grown = now[name] - before.get(name, 0)
        assert grown == more or ("passes_total" in name and more <= grown <= 2 * more), name
    assert (now["visar_rows"], now["visar_rows_running"], now["visar_images_waiting"]) == (3, 0, 0)


def _metrics(api: Api) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in api.ask("/metrics").body.decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in lines}


def test_the_openai_client(api: Api) -> None:
    """As it is, with nothing set but the address."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["text", "class"]
        assert client.models.retrieve("class").id == "class"
        asked: dict[str, Any] = {"prompt": "red heart", "model": "text", "extra_body": {"seed": 5, "sampler": "ar"}}
        found = client.images.generate(**asked, n=2, size="10x10", response_format="b64_json")
        files = [base64.b64decode(image.b64_json) for image in found.data]
        assert files == api.images(prompt="red heart", n=2, seed=5, sampler="ar").files
        assert found.usage.output_tokens == 50 and found.visar["seed"] == 5
        events = list(client.images.generate(**asked, stream=True, partial_images=2))
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
        assert base64.b64decode(events[-1].b64_json) == files[0] and events[1].partial_image_index == 1
        with pytest.raises(openai.BadRequestError, match="n must be from 1 to 4") as error:
            client.images.generate(prompt="cat", n=9)
        assert (error.value.param, error.value.code) == ("n", "invalid_value")
        with pytest.raises(openai.NotFoundError, match="Unknown model"):
            client.images.generate(prompt="cat", model="dall-e-3")
