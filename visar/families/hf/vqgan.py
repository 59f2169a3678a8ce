"""The decoder of a VQGAN (Esser et al. 2021, arXiv:2012.09841), as Chameleon has it, and, with another training of its
codes, Emu3.5 (IBQ, Shi et al. 2024, arXiv:2412.02692), with the published keys of both.

Codes are vectors of any length, which are not normalised; the decoder is that of latent diffusion. All sizes are read
from the shapes of the weights. The encoder of a file is left out: images are made, and not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from einops import rearrange
from torch import Tensor, nn

from visar.errors import VisarError
from visar.families.blocks import Decoder
from visar.families.weights import count, load_state, shape_of

UNUSED = ("encoder.", "quant_conv.", "loss.", "discriminator.", "quantize.codebook_used")
MIDDLE = ("block_1", "attn_1", "block_2")


class VQGAN(nn.Module):
    """Codes to pixels. `widths` are those of the levels, the largest map first; blocks are those of the encoder."""

    def __init__(self, codes: int, dim: int, widths: list[int], blocks: int, inputs: int, attention: bool):
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        self.post_quant_conv = nn.Conv2d(dim, inputs, 1)
        self.decoder = Decoder(widths, blocks, inputs, attention=attention)
        self.cell = 2 ** (len(widths) - 1)  # pixels of a code along one side

    def forward(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], for codes [B, rows, columns]."""
        return self.decoder(self.post_quant_conv(rearrange(self.embedding(codes), "b h w c -> b c h w")))

    @classmethod
    def load(cls, path: Path) -> VQGAN:
        """The decoder in a folder or a file of weights, fp32, on the CPU, in evaluation mode.

        Raises `VisarError` for a file that cannot be read, and for tensors that are missing, misshapen or unknown.
        """
        return cls.of(load_state(path), path)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], path: Path) -> VQGAN:
        """The decoder of weights by their published keys, as `load` says; `path` is for messages."""
        codes, dim = shape_of(state, "quantize.embedding.weight", path)
        inputs = shape_of(state, "post_quant_conv.weight", path, 4)[0]
        levels, blocks = count(state, "decoder.up."), count(state, "decoder.up.0.block.") - 1
        widths = [shape_of(state, f"decoder.up.{i}.block.0.conv1.weight", path, 4)[0] for i in range(levels)]
        if not widths or blocks < 0 or any(width % 32 for width in widths):
            raise VisarError(f"{path} holds no decoder of a VQGAN: its levels are {widths}.")
        attention = f"decoder.up.{levels - 1}.attn.0.q.weight" in state
        made = cls(codes, dim, widths, blocks, inputs, attention)
        wanted = {_published(name, levels): value for name, value in made.state_dict().items()}
        own = {key: value for key, value in state.items() if not key.startswith(UNUSED)}
        if unknown := sorted(own.keys() - wanted.keys()):
            raise VisarError(f"Tensor {unknown[0]!r} of {path} is unknown; a decoder of a VQGAN has none such.")
        if absent := sorted(wanted.keys() - own.keys()):
            more = f", and {len(absent) - 1} others are" if len(absent) > 1 else ""
            raise VisarError(f"Tensor {absent[0]!r} of the image decoder is missing from {path}{more}.")
        for key, value in own.items():
            if value.shape != wanted[key].shape:
                raise VisarError(
                    f"Tensor {key!r} of {path} has shape {list(value.shape)}, expected {list(wanted[key].shape)}."
                )
        made.load_state_dict({name: own[_published(name, levels)] for name in made.state_dict()})
        return made.eval().requires_grad_(False)


def _published(name: str, levels: int) -> str:
    """The key in files of a name in `VQGAN`: levels are numbered there from the largest map, here from the smallest."""
    name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"^decoder\.mid\.(\d)\.", lambda m: f"decoder.mid.{MIDDLE[int(m[1])]}.", name)
    return re.sub(r"^embedding\.", "quantize.embedding.", name).replace(".res.", ".block.")
