"""What an embedded model knows: its styles, its things by group, and the words that it was trained with.

`concepts.json` lies next to the text encoder's files, or in their place where another model's are shared;
`concepts("icons")` reads it. A prompt of another style, or of a thing that was never in training, gets a note that
names the styles or the nearest known thing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from visar.errors import VisarError
from visar.files import replacing
from visar.reading import read_json
from visar.text_encoders.spelling import stems, words_of

if TYPE_CHECKING:
    from torch import Tensor

    from visar.kernels.derived import Derived
    from visar.text_encoders.words import WordEncoder

FILE = "concepts.json"
# Words by which a prompt's last part shows that it means a style, and not a thing.
_OF_STYLES = """
    style art painting photo photograph sketch drawing render rendering cartoon comic anime watercolor watercolour oil
    pencil ink pixel realistic photorealistic illustration icon emoji cinematic 4k hd
"""
OF_STYLES = frozenset(_OF_STYLES.split())


@dataclass
class Listed:
    """What the file has."""

    styles: list[str]
    groups: dict[str, list[str]]
    words: list[str]


@dataclass
class Concepts:
    """`groups` has the names of things by the name of their group; `words` all words of training, these included."""

    styles: list[str]
    groups: dict[str, list[str]]
    words: list[str]
    _seen: frozenset[str] = field(init=False, repr=False, compare=False)
    _vectors: Derived[tuple[list[str], Tensor]] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._seen = frozenset(self.words)

    def names(self) -> list[str]:
        """All things, without the groups, each once."""
        return list(dict.fromkeys(name for names in self.groups.values() for name in names))

    def notes(self, prompt: str, encoder: WordEncoder) -> list[str]:
        """Sentences about what of the prompt is not known; none for a prompt of a known style and known words."""
        *parts, last = (part.strip() for part in prompt.lower().split(","))
        notes, things = [], [*parts, last]
        known = {style.lower() for style in self.styles}
        if any(part in known for part in things):
            things = [part for part in things if part not in known]
        elif parts and last and self.styles:
            words = words_of(last)
            if OF_STYLES.intersection(words) or not any(self._has(stems(w)) for w in words):
                things = parts
                named = (
                    f"styles are {', '.join(self.styles)}"
                    if len(self.styles) > 1
                    else f"only style is {self.styles[0]}"
                )
                notes.append(f"The style {last!r} was not in training; the {named}.")
        text = " ".join(things)
        strange = [w for w in words_of(text) if encoder.ids(w)[0] and not self._has(stems(w))]
        if strange:
            named = ", ".join(repr(w) for w in dict.fromkeys(strange))
            verb = "was" if len(set(strange)) == 1 else "were"
            nearest = self.nearest(text, encoder)
            notes.append(f"{named} {verb} never in training; the nearest known thing is {nearest!r}.")
        return notes

    def nearest(self, text: str, encoder: WordEncoder) -> str:
        """The name whose words' mean vector is nearest in angle to that of the text, which has a known word."""
        import torch  # here, because the list is read without torch

        from visar.kernels.derived import Derived

        def of_names() -> tuple[list[str], Tensor]:
            names = [n for n in self.names() if encoder.ids(n)[0]]
            return names, torch.stack([_mean(encoder, n) for n in names])

        if self._vectors is None:
            self._vectors = Derived()
        names, vectors = self._vectors.of([encoder.table, encoder.scale], of_names)
        return names[int((vectors @ _mean(encoder, text)).argmax())]

    def _has(self, forms: Iterable[str]) -> bool:
        return any(form in self._seen for form in forms)

    def save(self, folder: str | Path) -> None:
        entry = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        with replacing(Path(folder) / FILE) as part:
            part.write_text(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf8")

    @staticmethod
    def load(folder: str | Path) -> Concepts:
        """Those of a text encoder's folder; `VisarError` where the file is missing or damaged."""
        if (found := Concepts.find(folder)) is None:
            raise VisarError(f"This model has no list of what it knows ({Path(folder) / FILE} is not there).")
        return found

    @staticmethod
    def find(folder: str | Path) -> Concepts | None:
        """Those of a text encoder's folder, if it has any; `VisarError` where the file is damaged."""
        if not (path := Path(folder) / FILE).exists():
            return None
        found = read_json(path, Listed)
        return Concepts(found.styles, found.groups, found.words)


def _mean(encoder: WordEncoder, text: str) -> Tensor:
    import torch.nn.functional as F

    rows = encoder.ids(text)[0]
    table, scale = encoder.table[rows].cpu(), encoder.scale[rows].cpu()  # wherever the encoder is by then
    return F.normalize((table.float() * scale.float()[:, None]).mean(0), dim=0)


def concepts(model: str | Path) -> Concepts:
    """What the embedded model of this name, or the model in this folder, knows; `VisarError` where it has no list."""
    from visar.families.source import open_source

    return Concepts.load(open_source(model).own_folder("text_encoder"))


def listed(styles: Sequence[str], things: Iterable[tuple[str, str]], texts: Iterable[str]) -> Concepts:
    """Of the styles, the (group, name) of each training image, and all texts of training."""
    groups: dict[str, set[str]] = {}
    for group, name in things:
        groups.setdefault(group, set()).add(name)
    words = sorted({word for text in texts for word in words_of(text)})
    return Concepts(list(styles), {g: sorted(groups[g]) for g in sorted(groups)}, words)
