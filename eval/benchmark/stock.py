"""`ar` against the `generate` of transformers, on a Janus of random weights: time per token, and whether ids are equal.

    python -m visar.eval.benchmark.stock --dtype bfloat16

The model has the architecture of Janus-Pro at 0.15 billion parameters, so a CPU can run it. Both decode greedily with
guidance, in turns, in one process; random weights make no difference to the time of a pass. It imports transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.families.hf.janus import JanusDecoder
from visar.families.hf.session import TransformersSession
from visar.host import synchronize
from visar.samplers import Autoregressive, Target
from visar.tables import table

START, PAD, END = 2, 0, 3  # ids of the tiny vocabulary of prompts
PROMPT = 24  # ids of a prompt
SCALE = 5.0
SIZES = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12)


@dataclass(frozen=True)
class AgainstStock:
    """Milliseconds per token of both, medians over the repeats, their ratio, and the share of equal ids."""

    dtype: str
    device: str
    threads: int
    parameters: int
    tokens: int
    stock_ms: float
    ms: float
    ratio: float
    equal: float
    weights: str = "random"

    def __str__(self) -> str:
        head = ("DTYPE", "TOKENS", "GENERATE ms", "AR ms", "RATIO", "EQUAL IDS")
        row = (
            self.dtype, str(self.tokens), f"{self.stock_ms:.1f}", f"{self.ms:.1f}", f"{self.ratio:.2f}",
            f"{100 * self.equal:.0f}%",
        )  # fmt: skip
        return table(head, [row])


def random_janus(side: int, device: torch.device, dtype: torch.dtype, **sizes: int) -> Any:
    """A Janus of `side` x `side` tokens among 16,384."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    text = SIZES | sizes
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=64, num_key_value_heads=text["num_attention_heads"], max_position_embeddings=2048, **text
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16 * side, patch_size=16,
            mlp_ratio=2, projection_dim=text["hidden_size"], num_image_tokens=side**2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8, num_embeddings=16384, latent_channels=32, base_channels=32, channel_multiplier=[1] * 5,
            num_res_blocks=1, projection_dim=text["hidden_size"], image_token_embed_dim=text["hidden_size"],
        ),
        image_token_id=63,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = JanusForConditionalGeneration(config).eval()
    for p in model.parameters():
        if p.ndim > 1:  # wide enough for greedy ids to differ clearly
            nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5)
    own = model.generation_config
    own.bos_token_id, own.pad_token_id, own.eos_token_id = 1, PAD, END
    own.generation_kwargs = {"boi_token_id": START}
    return model.to(device, dtype)


def stock(model: Any, ids: Tensor, length: int) -> Tensor:
    """Greedy ids [1, N] by `generate`, with a cache of no more slots than it needs."""
    found: Tensor = model.generate(
        inputs=ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False,
        guidance_scale=SCALE, max_length=ids.shape[1] + length,
    )  # fmt: skip
    return found


def ours(model: Any, ids: Tensor, length: int) -> Tensor:
    """Greedy ids [1, N] by `ar`."""
    length_of = torch.tensor([ids.shape[1]])
    unconditional = torch.where((ids == 1) | (ids == START), ids, PAD)
    session = TransformersSession(
        JanusDecoder(model), ids, length_of, unconditional, length_of, length=length, window=1, guidance=Guidance(SCALE)
    )
    noise = Noise(0, torch.zeros(1, dtype=torch.long, device=ids.device))
    return decode(session, Autoregressive(), Target(top_k=1), noise).tokens


def measure(dtype: str, device: str = "cpu", side: int = 8, repeats: int = 5, **sizes: int) -> AgainstStock:
    """Both in turns, after a run of each that is not counted. Prefill is in the time of both."""
    where = torch.device(device)
    model = random_janus(side, where, getattr(torch, dtype), **sizes)
    ids = torch.randint(4, 60, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    ids[0, 0], ids[0, -1] = 1, START
    ids, length = ids.to(where), side**2
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    with torch.inference_mode():
        expected, found = stock(model, ids, length), ours(model, ids, length)
        for _ in range(repeats):
            for name, run in (("stock", lambda: stock(model, ids, length)), ("ours", lambda: ours(model, ids, length))):
                synchronize(where)
                start = time.perf_counter()
                run()
                synchronize(where)
                seconds[name].append(time.perf_counter() - start)
    ms = {name: 1e3 * statistics.median(values) / length for name, values in seconds.items()}
    return AgainstStock(
        dtype, device, torch.get_num_threads(), sum(p.numel() for p in model.model.language_model.parameters()),
        length, ms["stock"], ms["ours"],
        statistics.median(a / b for a, b in zip(seconds["stock"], seconds["ours"], strict=True)),
        float((expected == found).float().mean()),
    )  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--device", default="cpu")
    options.add_argument("--side", type=int, default=8, help="tokens along one side of the image (default: 8)")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    given = options.parse_args()
    found = measure(given.dtype, given.device, given.side, given.repeats)
    print(f"Janus of {found.parameters / 1e9:.2f} billion parameters, random weights, {found.device}, "
          f"{found.threads} threads, batch 1 with guidance, one run")  # fmt: skip
    print(found)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(asdict(found), file, indent=2)


if __name__ == "__main__":
    main()
