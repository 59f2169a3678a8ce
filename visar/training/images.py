"""Building the captioned image set from emoji drawings and furniture renders in licensed packages.

The set is a folder of lossless WebP images with a `pictures.json`, which `visar.training.data` reads. Emoji captions,
keywords and groups come from one table by code point, whatever the drawing style, so that styles share concepts.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from visar.errors import VisarError, unknown
from visar.files import new_folder
from visar.training.image_sources import CACHE, EMOJI_TEXT, STYLES, Package, Style, fetch, members

CATALOGUE = "PluginFurnitureCatalog.properties"
SHORTCODES = ("github", "iamcal", "joypixels")  # where two disagree, the first is right most often
NAME_TABLES = ("flat", "noto")  # styles whose icon names are known to stand for code points
BLANK = 250  # an image with no channel darker than this shows nothing on white


@dataclass(frozen=True)
class Text:
    """What is said about an image."""

    concept: str
    caption: str
    tags: tuple[str, ...]
    group: str

    @property
    def toned(self) -> bool:
        """A skin-toned form of another image (the bare skin tones are images of their own)."""
        if self.concept.startswith("name:"):
            return "skin tone" in self.caption
        return re.search(r"-1f3f[b-f]", self.concept) is not None

    @property
    def flag(self) -> bool:
        """A flag, whether or not it is an emoji (and golf's flag in a hole)."""
        return self.group == "flags" or self.caption.startswith("flag")


@dataclass(frozen=True)
class Art:
    """One image before it is drawn: SVG as text, or the bytes of an image file."""

    key: str
    text: Text
    source: str | bytes
    licence: str

    def entry(self, style: str) -> dict[str, object]:
        """What `pictures.json` says about it, but for the file name."""
        about = {"style": style, "licence": self.licence, "package": STYLES[style].package.name, "key": self.key}
        return {**about, **asdict(self.text)}


def _squash(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _code(hexcode: str) -> str:
    """Code points as all tables agree on them: lower case, without the variation selector."""
    return "-".join(c for c in hexcode.lower().split("-") if c != "fe0f")


def named(name: str, tags: tuple[str, ...] = (), group: str = "other") -> Text:
    """The text of an image that is no emoji: its own name."""
    return Text("name:" + _squash(name), name, tags, group)


class EmojiText:
    """Captions of emoji by code point, and code points by the names that icon sets give them."""

    def __init__(self, files: dict[str, bytes], name_tables: list[dict[str, str]]):
        tables = {PurePosixPath(name).stem: json.loads(content) for name, content in files.items()}
        groups = {g["order"]: g["message"] for g in tables["messages"]["groups"]}
        self.texts: dict[str, Text] = {}
        labels: dict[str, str] = {}
        for emoji in tables["data"]:
            # Only the letters that flags are spelled with have no group.
            group = groups[emoji["group"]] if "group" in emoji else "flags"
            for form in (emoji, *emoji.get("skins", ())):
                code = _code(form["hexcode"])
                self.texts[code] = Text(code, form["label"].lower(), tuple(emoji.get("tags", ())), group)
                labels[_squash(form["label"])] = code
        icons = {_squash(n): _code(c) for t in name_tables for c, n in t.items() if _code(c) in self.texts}
        shortcodes = {
            _squash(name): _code(code)
            for table in reversed(SHORTCODES)
            for code, names in tables[table].items()
            for name in ([names] if isinstance(names, str) else names)
        }
        self._tables = ({**icons, **labels}, shortcodes)

    def find(self, name: str) -> Text | None:
        """The emoji that an icon set calls `name`: "bear-face" is "bear", "winking" is "winking face"."""
        # Numbers tell drawings of one thing apart. This also makes keycap-0 to keycap-9 (blob, emojione) "keycap: *":
        # wrong, but kept, so that the set and its splits by concept stay what they are.
        name = re.sub(r"-\d$", "", name)
        squashed = _squash(name)
        tries = [squashed, _squash(name.removesuffix("-face")), squashed + "face", squashed.removesuffix("symbol")]
        return next((self.texts[t[n]] for t in self._tables for n in tries if n in t), None)


def icon_art(icons: dict[str, Any], codes: dict[str, str] | None, style: Style, emoji: EmojiText) -> Iterator[Art]:
    """The icons of an icon set, each with the emoji it stands for; `codes` maps code points to icon names."""
    by_icon = None if codes is None else {name: _code(code) for code, name in codes.items()}
    for name, icon in icons["icons"].items():
        if icon.get("hidden"):
            continue
        key = re.sub(r"-\d+$", "", name) if style.numbered else name
        text = emoji.find(name) if by_icon is None else emoji.texts.get(by_icon.get(name, ""))
        if text is None and not style.spaced:
            continue
        left, top, width, height = (
            icon.get(k, icons.get(k, default))
            for k, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
            f'height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        yield Art(key, text or named(key.replace("-", " ")), svg, style.licence)


def file_art(files: dict[str, bytes], style: Style, emoji: EmojiText) -> Iterator[Art]:
    """Image files that are named by code point."""
    for path, content in files.items():
        key = PurePosixPath(path).stem
        if text := emoji.texts.get(_code(key)):
            yield Art(key, text, content, style.licence)


def furniture_art(files: dict[str, bytes], style: Style) -> Iterator[Art]:
    """The renders in furniture libraries: zips with a Java properties file of `field#number=value` lines."""
    for path, content in files.items():
        library = PurePosixPath(path).name
        with zipfile.ZipFile(BytesIO(content)) as archive:
            lines = archive.read(CATALOGUE).decode("unicode_escape").splitlines()
            fields = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
            licence = "CC0-1.0" if fields.get("license") == "Public domain" else style.licence
            for number in [field.removeprefix("icon#") for field in fields if field.startswith("icon#")]:
                tags = tuple(t.strip() for t in fields.get(f"tags#{number}", "").lower().split(",") if t.strip())
                text = named(fields[f"name#{number}"].lower(), tags, fields[f"category#{number}"].lower())
                yield Art(f"{library}#{number}", text, archive.read(fields[f"icon#{number}"].lstrip("/")), licence)


def draw(source: str | bytes, size: int) -> Image.Image:
    """The image at `size`, whole and in the middle, on white."""
    if isinstance(source, str):
        try:
            import resvg_py
        except ImportError as error:
            raise VisarError("Drawing SVG images needs the package resvg-py; install visar[train].") from error
        # Without fonts of the machine, images come out alike everywhere.
        source = resvg_py.svg_to_bytes(svg_string=source, width=size, height=size, skip_system_fonts=True)
    image = Image.open(BytesIO(source)).convert("RGBA")
    if image.size != (size, size):
        image = ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return Image.alpha_composite(Image.new("RGBA", (size, size), "white"), canvas).convert("RGB")


def _json(package: Package, name: str, cache: Path) -> Any:
    return json.loads(members(fetch(package, cache), name)[name])


def codes_of(style: str, cache: Path) -> dict[str, str]:
    """Code point to icon name of one style."""
    table: dict[str, str] = _json(STYLES[style].package, "package/chars.json", cache)
    return table


def emoji_text(cache: Path) -> EmojiText:
    """The texts of all emoji."""
    names = ("data", "messages", *(f"shortcodes/{s}" for s in SHORTCODES))
    files = members(fetch(EMOJI_TEXT, cache), *(f"package/en/{name}.json" for name in names))
    return EmojiText(files, [codes_of(style, cache) for style in NAME_TABLES])


def art_of(name: str, emoji: EmojiText, cache: Path) -> Iterator[Art]:
    """All images of one style."""
    style = STYLES[name]
    if style.kind == "furniture":
        yield from furniture_art(members(fetch(style.package, cache), "*.sh3f"), style)
    elif style.kind == "files":
        yield from file_art(members(fetch(style.package, cache), "package/assets/*"), style, emoji)
    else:
        icons = _json(style.package, "package/icons.json", cache)
        yield from icon_art(icons, codes_of(style.codes_of, cache) if style.codes_of else None, style, emoji)


def _fetchable(styles: tuple[str, ...], cache: Path) -> list[str]:
    """Fetch the packages of `styles`, or of all styles; of all, those of Debian may be missing elsewhere."""
    for name in styles:
        if name not in STYLES:
            raise unknown("style", name, STYLES)
    chosen = []
    for name in dict.fromkeys(styles or STYLES):
        try:
            fetch(STYLES[name].package, cache)
            chosen.append(name)
        except VisarError as error:
            if styles or not STYLES[name].package.debian:
                raise
            print(f"{error} The style {name!r} is left out.", file=sys.stderr)
    return chosen


def build_images(
    out: Path,
    size: int = 128,
    styles: tuple[str, ...] = (),
    tones: bool = False,
    flags: bool = False,
    cache: Path = CACHE,
) -> int:
    """Write the images of `styles` (none named: all that can be had) to the new folder `out`; give their number.

    Skin-toned people and flags are left out unless asked for: they are many, and nearly alike.
    """
    if size < 1:
        raise VisarError(f"The image size must be at least 1 pixel, not {size}.")
    out = out.expanduser().absolute()
    with new_folder(out) as partial:
        chosen, emoji = _fetchable(styles, cache), emoji_text(cache)
        entries: list[dict[str, object]] = []
        for name in chosen:
            before = len(entries)
            for art in art_of(name, emoji, cache):
                if (art.text.toned and not tones) or (art.text.flag and not flags):
                    continue
                image = draw(art.source, size)
                if min(image.tobytes()) > BLANK:
                    continue
                file = f"{len(entries):05d}.webp"
                image.save(partial / file, lossless=True)
                entries.append({**art.entry(name), "file": file})
            print(f"{name}: {len(entries) - before} images", file=sys.stderr)
        (partial / "pictures.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf8")
    return len(entries)
