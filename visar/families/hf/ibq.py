"""The decoder of an IBQ image tokenizer (Shi et al. 2024, arXiv:2412.02692), as Emu3.5 has, with its published keys.

Codes are vectors of any length, which are not normalised; the decoder is that of latent diffusion. All sizes are read
from the shapes of the weights. The encoder of a file is left out: images are made, and not read.
"""

from __future__ import annotations

import re
from pathlib import Path

from einops import rearrange
from torch import Tensor, nn

from visar.errors import VisarError
from visar.families.blocks import Decoder
from visar.families.weights import count, load_state, shape_of

UNUSED = ("encoder.", "quant_conv.", "loss.", "discriminator.", "quantize.codebook_used")
MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


class IBQ(nn.Module):
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
    def load(cls, path: Path) -> IBQ:
        """The decoder in a folder or a file of weights, fp32, on the CPU, in evaluation mode.

        Raises `VisarError` for a file that cannot be read, and for tensors that are missing, misshapen or unknown.
        """
        state = load_state(path)
        codes, dim = shape_of(state, "quantize.embedding.weight", path)
        inputs = shape_of(state, "post_quant_conv.weight", path, 4)[0]
        levels, blocks = count(state, "decoder.up."), count(state, "decoder.up.0.block.") - 1
        widths = [shape_of(state, f"decoder.up.{i}.block.0.conv1.weight", path, 4)[0] for i in range(levels)]
        if not widths or blocks < 0 or any(width % 32 for width in widths):
            raise VisarError(f"{path} holds no decoder of an IBQ tokenizer: its levels are {widths}.")
        attention = f"decoder.up.{levels - 1}.attn.0.q.weight" in state
        made = cls(codes, dim, widths, blocks, inputs, attention)
        wanted, found = made.state_dict(), dict[str, Tensor]()
        for key, value in state.items():
            if key.startswith(UNUSED):
                continue
            if (name := _own_name(key, levels)) not in wanted:
                raise VisarError(f"Tensor {key!r} of {path} is unknown; a decoder of an IBQ tokenizer has none such.")
            if value.shape != wanted[name].shape:
                raise VisarError(
                    f"Tensor {key!r} of {path} has shape {list(value.shape)}, expected {list(wanted[name].shape)}."
                )
            found[name] = value
        if absent := sorted(wanted.keys() - found.keys()):
            raise VisarError(
                f"{path} has no tensor for {absent[0]!r} of the decoder, nor for {len(absent) - 1} others."
            )
        made.load_state_dict(found)
        return made.eval().requires_grad_(False)


def _own_name(key: str, levels: int) -> str:
    """The name in `IBQ` of a published key: its levels are numbered from the largest map, ours from the smallest."""
    key = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.conv_blocks.{levels - 1 - int(m[1])}.", key)
    key = re.sub(r"^decoder\.mid\.(\w+)\.", lambda m: f"decoder.mid.{MIDDLE.get(m[1], m[1])}.", key)
    return key.replace(".block.", ".res.").removeprefix("quantize.")
