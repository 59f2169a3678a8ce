"""A pool against calls of the model: mixed requests, what it refuses, and whose time is whose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.recording import Recorder
from tests.pipelines.test_masked import masked_folder  # noqa: F401  (a fixture)
from tests.pipelines.test_masked import pipe as masked_pipe  # noqa: F401
from visar.errors import VisarError
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.params import SamplingParams

# ruff: noqa: F811 (fixtures that are imported)


def asked(conditions: list[Any]) -> list[Request]:
    settings: list[dict[str, Any]] = [
        {}, {"seed": 7, "temperature": 0.7}, {"guidance_scale": 1.0, "top_k": 9}, {"seed": 2**64 - 1, "top_p": 0.8},
        {"guidance_scale": 4.0, "guidance_interval": 3}, {"seed": 3, "guidance_scale": 0.0},
    ]  # fmt: skip
    return [
        Request(conditions[i % len(conditions)], SamplingParams(**given), i % 4, tag=i)
        for i, given in enumerate([*settings, *settings[::-1]])
    ]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_request_has_the_tokens_of_a_call(
    kind: str, graphs: bool, text_pipe: Any, class_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ImageModel.of(text_pipe if kind == "text" else class_pipe)
    requests = asked(["red heart", "blue star", "cat"] if kind == "text" else [0, 3, 6])
    expected = [
        model.generate(r.condition, r.params, sampler="scd", first_image=r.image, output_type="tokens")
        for r in requests
    ]
    if graphs:
        model.sessions.capture = Recorder(monkeypatch)
    pool = Pool(model, "scd", size=4)
    found = {done.request.tag: done for done in pool.run(requests)}
    for request, out in zip(requests, expected, strict=True):
        done = found[request.tag]
        assert torch.equal(done.tokens, out.tokens[0]) and torch.equal(done.commit_pass, out.commit_pass[0])
        assert (done.passes, done.nfe) == (out.stats.passes_per_image[0], out.stats.nfe)
        assert done.seconds > 0 and not done.tokens.is_inference()
    assert pool.free == 4 and pool.row_passes == sum(done.passes for done in found.values())
    assert pool.passes < 1.4 * pool.row_passes / 4
    assert pool.places == (4 * pool.passes if graphs else pool.row_passes)


def test_an_image_that_is_let_go_makes_room(text_pipe: Any) -> None:
    pool = Pool(ImageModel.of(text_pipe), "ar", size=1)
    first = pool.admit(Request("cat"))
    pool.step()
    pool.release(first)
    (done,) = pool.run([Request("red heart", SamplingParams(seed=4))])
    expected = text_pipe("red heart", seed=4, sampler="ar", output_type="tokens").tokens[0]
    assert torch.equal(done.tokens, expected)


def test_what_a_pool_refuses(text_pipe: Any, masked_pipe: Any) -> None:
    model = ImageModel.of(text_pipe)
    for other, sampler in ((model, "zipar"), (ImageModel.of(masked_pipe), None)):
        with pytest.raises(VisarError, match=r"decodes all rows in lockstep; give it batches\.$"):
            Pool(other, sampler)
    with pytest.raises(VisarError, match="1 row or more, not 0"):
        Pool(model, size=0)
    with pytest.raises(VisarError, match="no guidance; give guidance_scale 1"):
        Pool(model, guided=False).admit(Request("cat"))
    with pytest.raises(VisarError, match="empty"):
        Pool(model).admit(Request(" "))


def test_weights_that_are_not_finite_give_no_image(text_pipe: Any) -> None:
    pool = Pool(ImageModel.of(text_pipe), "scd")
    pool.admit(Request("red heart"))
    with torch.no_grad():
        pool.family.model.norm.weight[0] = torch.nan
    with pytest.raises(VisarError, match="not finite in float32"):
        list(pool.run([Request("cat")]))
    with pytest.raises(VisarError, match="weights of 'gpt' are not finite"):
        Pool(pool.model, "scd").admit(Request("cat"))
