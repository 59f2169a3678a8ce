"""8-bit weights: rounding and products against fp64, pipelines that have them, what is refused, what it costs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.tiny import text_gpt
from visar.bulk.about import weights_mark
from visar.cli import main
from visar.engine import quantization
from visar.engine.layers import Linear
from visar.engine.quantization import QuantizedLinear, check, multiplies_bytes, planes, quantize, rounded, weights_of
from visar.errors import VisarError
from visar.eval.quality import cross_entropy
from visar.eval.quality.cross_entropy import Sample, Variant, change, nats
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rounding_is_bounded_and_symmetric(weights: str) -> None:
    w = torch.randn(37, 53) * torch.logspace(-6, 3, 37)[:, None]
    w[5] = 0
    stored, scale = rounded(w, weights)
    assert scale.dtype == torch.float32 and scale.shape == (37,)
    step = scale.double()[:, None]
    off = (stored.double() * step - w.double()).abs()
    bound = step / 2 if weights == "int8" else torch.maximum(w.double().abs() / 16, step / 1024)
    assert (off <= bound * (1 + 1e-5)).all() and off.max() > 0
    assert torch.equal(rounded(-w, weights)[0].float(), -stored.float())
    assert (stored[5].float() == 0).all()


def test_planes_keep_fifteen_bits() -> None:
    x = torch.randn(9, 40) * torch.logspace(-20, 20, 9)[:, None]
    x[3] = 0
    q, scale = planes(x)
    hi, lo = (q.double() - 128).chunk(2)
    assert ((scale.double() * (128 * hi + lo) - x.double()).abs() <= scale.double() * 0.501).all()
    assert not torch.isfinite(planes(torch.tensor([[1.0, float("inf")], [float("nan"), 1.0]]))[1]).any()


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 64, 96), (3, 33, 17), (70, 2048, 8)])
def test_product_against_fp64(
    rows: int, width: int, out: int, dtype: torch.dtype, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if integers and not multiplies_bytes():
        # The instruction itself is tested; the plain form, which is what runs without it, is the other parameter.
        pytest.skip("the product of bytes needs AVX512-VNNI; elsewhere the plain form is all there is")
    monkeypatch.setattr(quantization, "multiplies_bytes", lambda: integers)
    layer = QuantizedLinear(Linear(width, out, bias=rows == 3), "int8").to(dtype)
    x, more = torch.randn(2, rows, width, dtype=dtype), torch.randn(2, rows, out, dtype=dtype)
    with torch.inference_mode():
        y, behind = layer(x), layer(x, silu=True, times=more, plus=more)
    assert y.dtype == dtype and layer.scale.dtype == torch.float32
    w = layer.weight.double() * layer.scale.double()[:, None]
    true = x.double() @ w.t() + (0 if layer.bias is None else layer.bias.double())
    most = x.double().abs().amax(-1, keepdim=True) * w.abs().sum(1) + 1  # no sum is larger
    loss = (1 / 32512 if integers else 1e-6) if dtype == torch.float32 else 2**-8
    assert ((y.double() - true).abs() <= loss * most).all()
    want = torch.nn.functional.silu(y) * more + more
    torch.testing.assert_close(behind, want)
    layer.weight.data = layer.weight.data.clone()
    doubled = copy.deepcopy(layer)
    doubled.weight.data = (doubled.weight // 2).to(torch.int8)
    with torch.inference_mode():  # a copy has its own layout
        assert not torch.equal(doubled(x), y)


@pytest.mark.skipif(not multiplies_bytes(), reason="needs AVX512-VNNI")
def test_integer_rows_do_not_depend_on_the_others() -> None:
    layer, x = QuantizedLinear(Linear(64, 48, bias=False), "int8"), torch.randn(40, 64)
    with torch.inference_mode():
        assert torch.equal(layer(x)[7:8], layer(x[7:8]))


def test_what_is_rounded(text_pipe: TextToImagePipeline) -> None:
    before = {name: p.clone() for name, p in text_pipe.gpt.named_parameters()}
    text_pipe.quantize("int8")
    for name, p in text_pipe.gpt.named_parameters():
        inner = name.startswith("layers") and p.ndim == 2
        assert (p.dtype == torch.int8) == inner, name
        assert inner or torch.equal(p, before[name]), name
    assert sum(isinstance(m, QuantizedLinear) for m in text_pipe.gpt.modules()) == 2 * 5
    assert text_pipe.gpt.dtype == torch.float32 and weights_of(text_pipe.gpt) == "int8"


@pytest.mark.parametrize("sampler", ["scd", "eagle", "medusa", "swift", "kangaroo", "speculative"])
def test_samplers_and_drafters_on_rounded_weights(
    text_pipe: TextToImagePipeline, drafters: list[Path], sampler: str
) -> None:
    text_pipe.quantize("int8")
    for folder in drafters:
        text_pipe.load_drafter(folder)
    out = text_pipe(["cat", "red heart"], sampler=sampler, output_type="tokens")
    assert out.stats.settings["weights"] == "int8" and out.stats.exact
    assert out.tokens.min() >= 0 and out.tokens.max() < 24


def test_native_is_said_and_changes_nothing(class_pipe: ClassToImagePipeline) -> None:
    before = class_pipe([1], output_type="tokens")
    class_pipe.quantize("native")
    after = class_pipe([1], output_type="tokens")
    assert torch.equal(before.tokens, after.tokens) and after.stats.settings["weights"] == "native"


def test_greedy_tokens_are_those_of_the_written_out_model(class_pipe: ClassToImagePipeline) -> None:
    written = copy.deepcopy(class_pipe.gpt)
    for layer in written.layers.modules():
        if isinstance(layer, nn.Linear):
            stored, scale = rounded(layer.weight, "int8")
            layer.weight.data = stored.float() * scale[:, None]
    with torch.inference_mode():
        tokens = torch.randint(0, 24, (2, 24))
        native, want = (g(torch.tensor([1, 2]), tokens) for g in (class_pipe.gpt, written))
        mark = weights_mark(class_pipe.image_model)
        class_pipe.quantize("int8")
        have = class_pipe.gpt(torch.tensor([1, 2]), tokens)
    torch.testing.assert_close(have, want, atol=3e-4, rtol=1e-3)
    assert (have - want).abs().max() < (native - want).abs().max() / 4
    assert weights_mark(class_pipe.image_model) != mark  # a run of the other model is another run


def test_refusals(text_pipe: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VisarError, match="Unknown kind of weights 'int4'"):
        text_pipe.quantize("int4")
    with pytest.raises(VisarError, match=r"fp8 weights need a GPU .* not a cpu"):
        text_pipe.quantize("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(VisarError, match=r"this GPU has 8\.6"):
        check("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check("fp8", torch.device("cuda"))
    hook = text_pipe.gpt.layers[0].attention.wo.register_forward_hook(lambda *_: None)
    with pytest.raises(VisarError, match=r"The layer wo \(Linear\) has been changed"):
        text_pipe.quantize("int8")
    hook.remove()
    assert weights_of(text_pipe.gpt) == "native"
    text_pipe.quantize("int8")
    text_pipe.quantize("int8")
    with pytest.raises(VisarError, match="are int8 already"):
        text_pipe.quantize("native")
    for dtypes in ({}, {"gpt": torch.float16}):
        with pytest.raises(VisarError, match="is not saved"):
            text_pipe.save_pretrained(tmp_path / "x", dtypes=dtypes)
    assert not (tmp_path / "x").exists()
    with pytest.raises(VisarError, match="cannot be trained"):
        text_pipe.gpt(*text_pipe.text_encoder.encode(["cat"])[:1], torch.zeros(1, 3, dtype=torch.long))


def test_a_mar_is_refused() -> None:
    from visar import TextToImagePipeline

    with pytest.raises(VisarError, match="not for MARs"):
        TextToImagePipeline.from_pretrained("icons-mar").quantize("int8")


def test_conversion_rounds_no_scale() -> None:
    gpt = text_gpt()
    quantize(gpt, "fp8")
    layer: Any = gpt.layers[0].attention.wo
    scale = layer.scale.clone()
    gpt.to(torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn and torch.equal(layer.scale, scale)


def test_command_line(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tail = ["generate", "cat", "--model", str(text_folder), "-o", str(tmp_path)]
    assert main([*tail, "--json", "--quantize", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["weights"] == "int8"
    assert main([*tail, "--quantize", "fp8", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("visar: error: fp8 weights need a GPU")
    for wrong in ([*tail, "--quantize", "int4"], ["train", "drafter", "--quantize", "int8", "--out", str(tmp_path)]):
        assert main(wrong) == 2


def test_change_is_paired() -> None:
    before, shift = torch.randn(50).double() * 9, torch.randn(50).double() / 100
    found = change(before, before + shift)
    assert found.change == pytest.approx(shift.mean().item()) and found.error == pytest.approx(
        shift.std().item() / 50**0.5
    )


def test_nats_are_those_of_each_image(text_pipe: TextToImagePipeline) -> None:
    features, mask = text_pipe.text_encoder.encode(["cat", "red heart", "dog"])
    tokens = torch.randint(0, 24, (3, 25))
    found = nats(text_pipe.gpt, Sample(features, mask, tokens), batch=2)
    with torch.inference_mode():
        law = text_pipe.gpt(features, tokens[:, :-1], mask).double().log_softmax(-1)
    torch.testing.assert_close(found, -law.gather(2, tokens[..., None]).mean((1, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nats(Variant().of(text_pipe.gpt), Sample(features, mask, tokens)), found)
    head = Variant(weights="int8", head=True).of(text_pipe.gpt)
    assert isinstance(head.output, QuantizedLinear)


def test_module_on_its_own_images(class_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(class_folder), "--class", "1", "--class", "3", "--images", "2"]
    assert cross_entropy.main([*arguments, "--weights", "int8; fp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["float32", "int8", "fp8"] and found["int8"]["bytes"] < found["float32"]["bytes"]
    assert found["int8"]["samples"]["own"]["images"] == 4
    assert abs(found["int8"]["samples"]["own"]["change"]) < abs(found["fp8"]["samples"]["own"]["change"]) + 0.01
    assert cross_entropy.main([*arguments, "--weights", "int8"]) == 0 and "int8: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", ["--weights int3", "--images 1", "--model nowhere", "--model icons-mar", "--class 1 --data TMP"]
)
def test_module_refuses(words: str, class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    from PIL import Image

    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    model = [] if "--model" in words else ["--model", str(class_folder), "--class", "2"]
    assert cross_entropy.main([*model, *words.replace("TMP", str(tmp_path)).split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("visar: error: ") and err.count("\n") == 1
