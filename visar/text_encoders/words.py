"""A caption encoder small enough to ship: a table of word vectors, compressed from a sentence encoder.

It stands where LlamaGen has FLAN-T5. The features of a caption are its words' vectors, repeated until the condition
slots are full: slots are attended uniformly, so repeating keeps a caption's meaning, lets later slots see all words,
and gives a short caption the weight of a long one. The vectors are principal components of MiniLM's embedding of each
word alone, so words of like meaning have like features, and words that no training caption had are still understood.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from safetensors.torch import save_file
from torch import Tensor, nn

from visar.engine.component import read_tensors
from visar.errors import VisarError
from visar.files import path_of, replacing, writable_folder
from visar.reading import read_json
from visar.text_encoders.concepts import Concepts
from visar.text_encoders.spelling import stems, words_of
from visar.texts import read_text


@dataclass
class Settings:
    """The configuration of a word encoder: the slots of a caption."""

    length: Annotated[int, Interval(ge=1, le=4096)]


class WordEncoder(nn.Module):
    """Words to vectors. `table` is int8 [n, features], `scale` fp32 [n]; a word's vector is table * scale.

    `concepts` says what the model behind it was trained on, where that is known.
    """

    table: Tensor
    scale: Tensor

    def __init__(
        self,
        words: Sequence[str],
        table: Tensor,
        scale: Tensor,
        length: int = 12,
        concepts: Concepts | None = None,
    ):
        super().__init__()
        if len(words) != len(table) or len(words) != len(scale):
            raise VisarError(f"A word table of {len(table)} rows does not fit {len(words)} words.")
        self.words = list(words)
        self.length = length
        self.concepts = concepts
        self.register_buffer("table", table)
        self.register_buffer("scale", scale)
        self._index = {w: i for i, w in enumerate(self.words)}

    @staticmethod
    def compress(words: Sequence[str], vectors: Tensor, features: int = 128, length: int = 12) -> WordEncoder:
        """Keep `features` principal components of vectors [n, d], unit length, rounded to int8."""
        x = vectors.float() - vectors.float().mean(0)
        _, _, axes = torch.linalg.svd(x, full_matrices=False)
        x = torch.nn.functional.normalize(x @ axes[:features].T, dim=-1)
        scale = x.abs().amax(-1) / 127
        return WordEncoder(words, (x / scale[:, None]).round().to(torch.int8), scale, length)

    def knowing(self, concepts: Concepts | None) -> WordEncoder:
        """The same words, for a model that was trained on these things."""
        return WordEncoder(self.words, self.table, self.scale, self.length, concepts)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def width(self) -> int:
        """Features of a slot."""
        return self.table.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def ids(self, text: str) -> tuple[list[int], list[str]]:
        """Rows of the known words of a text, and the words that are not known."""
        known, missing = [], []
        for word in words_of(text):
            row = next((self._index[s] for s in stems(word) if s in self._index), None)
            known.append(row) if row is not None else missing.append(word)
        return [r for r in known if r is not None], missing

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features [B, length, features], fp32, and the mask of valid slots [B, length], which are all.

        Unknown words are left out with a warning; a prompt with no known word is a `VisarError`.
        """
        slots = []
        for prompt in prompts:
            for note in self.left_out([prompt]):
                warnings.warn(note, stacklevel=2)
            slots.append((self.ids(prompt)[0] * self.length)[-self.length :])
        at = torch.tensor(slots, device=self.device)
        features = self.table[at].float() * self.scale[at].float().unsqueeze(-1)
        return features, torch.ones(at.shape, dtype=torch.bool, device=self.device)

    def left_out(self, prompts: Sequence[str]) -> list[str]:
        """Which words are not used, in sentences. Raises `VisarError` for a prompt with no known word."""
        said = []
        for prompt in prompts:
            rows, missing = self.ids(prompt)
            if not rows:
                raise VisarError(f"No word of the prompt {prompt!r} is known to this model; use English words.")
            if missing:
                said.append(f"Words not known to this model were left out: {', '.join(missing)}.")
            if len(rows) > self.length:
                said.append(f"Only the last {self.length} words of a long prompt are used.")
        return said

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """What of the prompts the model was not trained on, in sentences, each once; none where it is not known."""
        if self.concepts is None:
            return []
        return list(dict.fromkeys(note for prompt in prompts for note in self.concepts.notes(prompt, self)))

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        folder = writable_folder(folder)
        with replacing(folder / "words.txt") as part:
            part.write_text("\n".join(self.words) + "\n", encoding="utf-8")
        with replacing(folder / "config.json") as part:
            part.write_text(json.dumps({"length": self.length}) + "\n", encoding="utf-8")
        with replacing(folder / "model.safetensors") as part:
            save_file({"table": self.table.cpu(), "scale": self.scale.cpu()}, part)
        if self.concepts is not None:
            self.concepts.save(folder)

    @staticmethod
    def from_pretrained(folder: str | Path, **_: object) -> WordEncoder:
        folder = path_of("The folder", folder)
        length = read_json(folder / "config.json", Settings).length
        words = read_text(folder / "words.txt").split()
        tensors = read_tensors(file := folder / "model.safetensors")
        table, scale = (tensors.get(name) for name in ("table", "scale"))
        if table is None or scale is None or table.dtype != torch.int8 or table.ndim != 2 or scale.ndim != 1:
            raise VisarError(f"{file} must hold a table, int8 [words, features], and a scale, fp32 [words].")
        known = Concepts.find(folder)
        return WordEncoder(words, table, scale, length, known)
