"""Sizes of the published decoders that run by transformers' own modules. A table of data that imports no torch.

From their configurations. What follows from them, numbers of weights and bytes, is counted here, and
`tests/families/hf/test_sizes.py` compares the counts with transformers' modules of these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderSize:
    """A causal decoder and its images of `tokens` tokens, `line_ends` of which end rows and cost no pass.

    `vocab` is the number of ids of prompts, `codes` that of images, and `head` the number of rows of the output head if
    it has fewer than `vocab`. `norms` are a layer's of `dim` weights, `qk_norm` is the number of a layer's weights of
    norms of queries and keys. A model with `own_codes` has an embedding, an alignment and a head for codes alone.
    `context` is the number of positions; without guidance a pass is of one batch.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    codes: int
    tokens: int
    context: int
    head_dim: int = 128
    head: int = 0
    norms: int = 2
    qkv_bias: bool = False
    qk_norm: int = 0
    line_ends: int = 0
    own_codes: bool = False
    guided: bool = True

    @property
    def matrices(self) -> tuple[int, int]:
        """The weights of the linear layers between embeddings and head, and how many rows they have."""
        queries, kv = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        rows = queries + kv + 2 * self.ffn + 2 * self.dim
        return self.layers * (2 * queries + kv + 3 * self.ffn) * self.dim, self.layers * rows

    @property
    def layer_weights(self) -> int:
        queries, kv = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        attention = (2 * queries + kv) * self.dim + (queries + kv) * self.qkv_bias + self.qk_norm
        return self.layers * (attention + (3 * self.ffn + self.norms) * self.dim) + self.dim

    @property
    def weights(self) -> int:
        """Weights that every pass reads: layers, last norm, and the output head's rows of codes."""
        if not self.own_codes:
            return self.layer_weights + self.codes * self.dim
        align = (CODE_DIM + 1) * self.dim + (self.dim + 1) * self.dim
        return self.layer_weights + align + (self.dim + 1) * (self.dim + self.codes)

    @property
    def parameters(self) -> int:
        """All weights of the decoder, its embeddings and its head, without those that read images."""
        if self.own_codes:  # a head for words does nothing for images
            return self.weights + self.vocab * self.dim + CODE_DIM * self.codes
        return self.layer_weights + (self.vocab + (self.head or self.vocab)) * self.dim

    def cache(self, rows: int, slots: int) -> int:
        """Numbers of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * rows * slots

    def streamed(self, batch: int) -> int:
        """Numbers that a pass must read halfway through `batch` images, without those of prompts."""
        return self.weights + self.cache(batch * (1 + self.guided), self.tokens // 2)


CODE_DIM = 8  # of Janus's embedding of codes


def _janus(layers: int, dim: int, heads: int, ffn: int) -> DecoderSize:
    return DecoderSize(
        layers, dim, heads, heads, ffn, vocab=102400, codes=16384, tokens=576, context=16384, head_dim=dim // heads,
        own_codes=True,
    )  # fmt: skip


def _chameleon(side: int, context: int, line_ends: int = 0) -> DecoderSize:
    return DecoderSize(
        32, 4096, 32, 32, 11008, vocab=65536, codes=8192, tokens=side**2 + line_ends, line_ends=line_ends,
        context=context, qk_norm=4 * 4096,
    )  # fmt: skip


SIZES: dict[str, DecoderSize] = {
    "janus-pro-1b": _janus(24, 2048, 16, 5632),
    "janus-pro-7b": _janus(30, 4096, 32, 11008),
    "glm-image": DecoderSize(
        40, 4096, 32, 2, 13696, vocab=168064, codes=16384, tokens=16 * 16 + 32 * 32, context=131072, head=16512,
        norms=4, qkv_bias=True, guided=False,
    ),
    "emu3-gen": DecoderSize(
        32, 4096, 32, 8, 14336, vocab=184622, codes=32768, tokens=90 * 91, line_ends=90, context=9216
    ),
    "emu3.5-image": DecoderSize(
        64, 5120, 64, 8, 25600, vocab=282926, codes=131072, tokens=64 * 65, line_ends=64, context=32768,
        qk_norm=2 * 128,
    ),
    "anole": _chameleon(32, 4096),
    "lumina-mgpt-512": _chameleon(32, 10240, 32),
    "lumina-mgpt-768": _chameleon(48, 10240, 48),
    "lumina-mgpt-1024": _chameleon(64, 10240, 64),
}  # fmt: skip
