"""What would have no effect on decoding is refused by a sentence, and what must have none has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from visar.cli import main
from visar.errors import VisarError

Pipe = Any


def tokens(pipe: Pipe, prompt: Any = "red heart", **settings: Any) -> torch.Tensor:
    return pipe(prompt, output_type="tokens", **settings).tokens


def test_offloading_is_refused(text_pipe: Pipe) -> None:
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(VisarError, match="keeps the weights on one device"):
            getattr(text_pipe, name)()
    with pytest.raises(VisarError, match="chooses its own attention kernels"):
        text_pipe.enable_attention_slicing("auto")
    with pytest.raises(VisarError, match="Adapters are not loaded"):
        text_pipe.load_lora_weights("folder", weight_name="x")


@pytest.mark.parametrize("name", ["gpt", "vq"])
def test_wrapped_models_are_refused(text_pipe: Pipe, name: str) -> None:
    part = getattr(text_pipe, name)
    for wrap, message in (
        (torch.nn.DataParallel, "DataParallel does not split decoding"),
        (torch.compile, f"torch.compile has no effect on {name}"),
    ):
        with pytest.raises(VisarError, match=message):
            setattr(text_pipe, name, wrap(part))
    assert getattr(text_pipe, name) is part
    handle = part.register_forward_hook(lambda *_: None)
    with pytest.raises(VisarError, match=f"A forward hook of {name} has no effect"):
        text_pipe("red heart")
    handle.remove()
    part.forward = part.forward
    with pytest.raises(VisarError, match=f"Another forward of {name} has no effect"):
        text_pipe("red heart")
    del part.forward
    part.compile()
    with pytest.raises(VisarError, match=f"torch.compile has no effect on {name}"):
        text_pipe("red heart")


def test_layers_that_are_read_and_not_called(text_pipe: Pipe) -> None:
    for name in ("quantize", "quantize.embedding"):
        part = text_pipe.vq.get_submodule(name)
        handle = part.register_forward_hook(lambda *_: None)
        with pytest.raises(VisarError, match=f"A forward hook of vq.{name} has no effect"):
            text_pipe("red heart")
        handle.remove()
        part.compile()
        with pytest.raises(VisarError, match=f"torch.compile has no effect on vq.{name}"):
            text_pipe("red heart")
        part._compiled_call_impl = None


def test_half_converted_and_empty_models_are_refused(text_pipe: Pipe) -> None:
    for part, name in ((text_pipe.gpt.layers[0].attention, "gpt"), (text_pipe.vq.decoder, "vq")):
        part.half()
        with pytest.raises(VisarError, match=f"{name} has weights in float16 and float32; convert all of it to one"):
            text_pipe("red heart")
        part.float()
    text_pipe.vq.to("meta")
    with pytest.raises(VisarError, match="vq is on the device 'meta', which holds no weights"):
        text_pipe("red heart")


def test_layers_in_a_dtype_that_decoding_can_mix(text_pipe: Pipe) -> None:
    vq = text_pipe.to(torch.bfloat16).vq
    norms = [layer.float() for layer in vq.decoder.modules() if isinstance(layer, torch.nn.GroupNorm)]
    vq.encoder.float()
    vq.quant_conv.double()
    assert norms and text_pipe("red heart").images
    norms[0].double()
    with pytest.raises(VisarError, match="vq has weights in bfloat16 and float64; convert all of it to one"):
        text_pipe("red heart")


def test_layers_of_your_own_decode(text_pipe: Pipe) -> None:
    """A layer in the place of a linear one, such as an adapter, sees what that one sees."""
    before = tokens(text_pipe)

    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear, scale: float):
            super().__init__()
            self.base, self.scale = base, scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * self.scale

    block = text_pipe.gpt.layers[0]
    for layer, name in ((block.attention, "wo"), (block.feed_forward, "w1"), (block.feed_forward, "w2")):
        base = getattr(layer, name)
        setattr(layer, name, Adapter(base, 1.0))
        assert torch.equal(tokens(text_pipe), before)
        setattr(layer, name, Adapter(base, -9.0))
        assert not torch.equal(tokens(text_pipe), before)
        setattr(layer, name, base)


def test_adapters_of_peft_are_refused(text_pipe: Pipe) -> None:
    gpt = text_pipe.gpt
    gpt.layers[0].attention.wo.base_layer, gpt.layers[0].attention.wo.active_adapters = torch.nn.Identity(), ["a"]
    with pytest.raises(VisarError, match="merge them first"):
        text_pipe("red heart")


def test_autocast_and_default_dtype_change_nothing(text_pipe: Pipe) -> None:
    plain = text_pipe("red heart", output_type="pt")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = text_pipe("red heart", output_type="pt")
    torch.set_default_dtype(torch.float64)
    try:
        wide = text_pipe("red heart", output_type="pt")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        elsewhere = text_pipe("red heart", output_type="pt")
    for out in (inside, wide, elsewhere):
        assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.images, plain.images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(text_pipe.decode_tokens(plain.tokens), plain.images)
    assert "float32_matmul_precision" not in plain.stats.settings
    torch.set_float32_matmul_precision("medium")
    try:
        assert text_pipe("red heart", output_type="tokens").stats.settings["float32_matmul_precision"] == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tokens_that_no_image_has_are_refused(text_pipe: Pipe) -> None:
    good = tokens(text_pipe)
    for bad, message in (
        (good[:, :7], r"tokens must be a tensor \[B, 25\], not \[1, 7\]"),
        (good.tolist(), r"tokens must be a tensor \[B, 25\], not a list"),
        (good + 99, "an id that is no image token"),
    ):
        with pytest.raises(VisarError, match=message):
            text_pipe.decode_tokens(bad)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("serve --port 0 --sampler ar --drafter EAGLE", "of the kind 'eagle', which no sampler here uses"),
        ("bench --samplers scd:window=4,sjd:window=8 --window 6", "Each of these samplers was given its own window"),
        ("bench --samplers zipar:ahead=4 --set ahead=6", "Each of these samplers was given its own ahead"),
        ("generate cat -o OUT/a.png --model icons --vq OUT/p.txt", "There is no weights file icons, and nothing else"),
    ],
)
def test_options_that_nothing_reads(
    text_folder: Path, drafters: list[Path], tmp_path: Path, capsys: Any, command: str, message: str
) -> None:
    (tmp_path / "p.txt").write_text("cat\n")
    kinds = {"EAGLE": drafters[0], "MEDUSA": next(path for path in drafters if path.name == "medusa")}
    words = [str(kinds.get(word, word)).replace("OUT", str(tmp_path)) for word in command.split()]
    assert main([*words, *([] if "--model" in words else ["--model", str(text_folder)])]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
