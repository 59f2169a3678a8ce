"""The image set builder, on tiny packages made here: joining names with emoji, filters, drawing, fetching, errors."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from visar.errors import VisarError
from visar.training import images
from visar.training.data import ImageSet
from visar.training.image_sources import EMOJI_TEXT, STYLES, Package, fetch, members
from visar.training.images import EmojiText, build_images, draw

RED = '<path fill="#f00" d="M0 0h8v8H0z"/>'
WHITE = '<path fill="#fff" d="M0 0h8v8H0z"/>'
TEXTS = {
    "data": [
        {"label": "bear", "hexcode": "1F43B", "tags": ["animal"], "group": 3},
        {"label": "Christmas tree", "hexcode": "1F384", "tags": ["celebration", "tree"], "group": 6},
        {"label": "dizzy", "hexcode": "1F4AB", "group": 3},
        {"label": "face with crossed-out eyes", "hexcode": "1F635", "group": 3},
        {"label": "winking face", "hexcode": "1F609", "group": 3},
        {"label": "link", "hexcode": "1F517", "group": 3},
        {"label": "black flag", "hexcode": "1F3F4", "group": 9},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {
            "label": "raised hand",
            "hexcode": "270B-FE0F",
            "tags": ["stop"],
            "group": 1,
            "skins": [{"label": "raised hand: dark skin tone", "hexcode": "270B-1F3FF"}],
        },
    ],
    "messages": {
        "groups": [
            {"order": 1, "message": "people & body"},
            {"order": 3, "message": "animals & nature"},
            {"order": 6, "message": "activities"},
            {"order": 9, "message": "flags"},
        ]
    },
    "shortcodes/github": {"1F4AB": "dizzy", "1F635": ["dizzy_face", "knocked_out"], "1F384": "tree"},
    "shortcodes/iamcal": {"1F43B": "tree"},
    "shortcodes/joypixels": {},
}
FLAT = {"1f43b": "bear", "1f384": "christmas-tree", "270b": "raised-hand", "270b-1f3ff": "raised-hand-dark"}


def icon_set(**icons: str) -> dict[str, object]:
    return {"width": 8, "height": 8, "icons": {k.replace("_", "-"): {"body": v} for k, v in icons.items()}}


def tar(files: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def npm(**files: object) -> bytes:
    packed = {f"package/{name}.json": json.dumps(content).encode() for name, content in files.items()}
    return tar(packed, "w:gz")


def image(size: tuple[int, int], colour: tuple[int, ...], kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", size, colour).save(out, kind, **({"lossless": True} if kind == "webp" else {}))
    return out.getvalue()


def debian(files: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, content in {"debian-binary": b"2.0", "data.tar.xz": tar(files, "w:xz")}.items():
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return out


def furniture() -> bytes:
    catalogue = (
        "# c=d\nlicense=Public domain\nicon#1=/a/bill.png\nname#1=Bill 10\\u20ac\n"
        "tags#1=Some Maker, Money\ncategory#1=Office\n"
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", catalogue)
        archive.writestr("a/bill.png", image((8, 4), (0, 0, 255, 255), "png"))
    return out.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a small package for each of six styles, with `STYLES` cut down to them."""
    three_d = {
        "package/assets/1f43b.webp": image((16, 16), (0, 255, 0, 255), "webp"),
        "package/assets/1f3f4.webp": image((16, 16), (0, 0, 0, 255), "webp"),
        "package/assets/zz.webp": image((16, 16), (0, 0, 0, 255), "webp"),
    }
    hands = icon_set(bear=RED, christmas_tree=RED, raised_hand=RED, raised_hand_dark=RED)
    hands["icons"]["bear"]["hidden"] = True  # type: ignore[index]
    made = {
        "noto": npm(icons=icon_set(bear=RED, pickle=RED, flag_for_x=RED), chars={"1f43b": "bear", "1fadd": "pickle"}),
        "flat": npm(icons=hands, chars=FLAT),
        "blob": npm(icons=icon_set(bear_face=RED, dizzy_face=RED, digit_one=WHITE)),
        "streamline": npm(icons=icon_set(bear_1=RED, bear_2=RED, amazed_face=RED)),
        "3d": tar(three_d, "w:gz"),
        "rendered": debian({"./usr/share/x/Some.sh3f": furniture()}),
    }
    folder = tmp_path / "cache"
    folder.mkdir()

    def packed(package: Package, content: bytes) -> Package:
        package = replace(package, sha256=sha256(content).hexdigest())
        (folder / package.file).write_bytes(content)
        return package

    for name in list(STYLES):
        if name in made:
            style = replace(STYLES[name], package=packed(STYLES[name].package, made[name]))
            monkeypatch.setitem(STYLES, name, style)
        else:
            monkeypatch.delitem(STYLES, name)
    texts = npm(**{f"en/{name}": content for name, content in TEXTS.items()})
    monkeypatch.setattr(images, "EMOJI_TEXT", packed(EMOJI_TEXT, texts))
    monkeypatch.setattr("shutil.which", lambda tool: None)  # nothing is fetched
    return folder


def entries(folder: Path) -> list[dict[str, object]]:
    read: list[dict[str, object]] = json.loads((folder / "pictures.json").read_text(encoding="utf8"))
    return read


def captions(folder: Path) -> list[object]:
    return [e["caption"] for e in entries(folder)]


def test_names_join_with_emoji() -> None:
    emoji = EmojiText({f"{k}.json": json.dumps(v).encode() for k, v in TEXTS.items()}, [FLAT, {"20e3": "keycap"}])

    def code(name: str) -> str | None:
        found = emoji.find(name)
        return found.concept if found else None

    assert code("christmastree") == "1f384"  # label, lower case
    assert code("bear-face") == code("bear-2") == "1f43b"
    assert code("winking") == "1f609"
    assert code("linksymbol") == "1f517"
    assert code("dizzy-face") == "1f4ab"  # labels go before shortcodes
    assert code("dizzyface") == "1f635"
    assert code("tree") == "1f384"  # the first shortcode table wins
    assert code("raised-hand-dark") == "270b-1f3ff"  # icon name of another set
    assert code("keycap") is None  # a code point without text
    assert emoji.texts["1f1e6"].flag and emoji.texts["1f3f4"].flag and not emoji.texts["1f43b"].flag
    assert emoji.texts["270b-1f3ff"].toned and emoji.texts["270b-1f3ff"].tags == ("stop",)


def test_build_and_read_back(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    out = tmp_path / "out"
    assert build_images(out, 16, cache=cache) == 11
    by_style = {s: [e["caption"] for e in entries(out) if e["style"] == s] for s in STYLES}
    assert by_style == {
        "noto": ["bear", "pickle"],
        "blob": ["bear", "dizzy"],  # the white digit cannot be seen
        "flat": ["christmas tree", "raised hand"],
        "streamline": ["bear", "bear", "amazed face"],
        "3d": ["bear"],
        "rendered": ["bill 10€"],
    }
    first, last = entries(out)[0], entries(out)[-1]
    assert first == {
        "style": "noto",
        "licence": "Apache-2.0",
        "package": "@iconify-json/noto",
        "key": "bear",
        "concept": "1f43b",
        "caption": "bear",
        "tags": ["animal"],
        "group": "animals & nature",
        "file": "00000.webp",
    }
    assert (last["key"], last["licence"], last["group"]) == ("Some.sh3f#1", "CC0-1.0", "office")
    assert last["tags"] == ["some maker", "money"]
    pixels = ImageSet(out).pixels(16)
    assert pixels[0, :, 8, 8].tolist() == [255, 0, 0]
    assert pixels[-1, :, 8, 8].tolist() == [0, 0, 255] and pixels[-1, :, 0, 0].tolist() == [255, 255, 255]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]  # nothing half-made stays behind


def test_styles_tones_and_flags(cache: Path, tmp_path: Path) -> None:
    build_images(tmp_path / "a", 8, styles=("3d",), flags=True, cache=cache)
    assert captions(tmp_path / "a") == ["black flag", "bear"]
    pytest.importorskip("resvg_py")
    build_images(tmp_path / "b", 8, styles=("flat", "noto"), tones=True, flags=True, cache=cache)
    assert captions(tmp_path / "b") == [
        "christmas tree",
        "raised hand",
        "raised hand: dark skin tone",
        "bear",
        "pickle",
        "flag for x",
    ]


def test_images_keep_their_shape() -> None:
    drawn = draw(image((8, 4), (0, 0, 0, 255), "png"), 16)
    assert drawn.size == (16, 16) and drawn.mode == "RGB"
    assert [drawn.getpixel((8, y)) for y in (3, 4, 11, 12)] == [(255,) * 3, (0,) * 3, (0,) * 3, (255,) * 3]


def test_a_missing_tool_matters_only_if_needed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / STYLES["rendered"].package.file).unlink()
    for name in ("noto", "flat", "blob", "streamline"):
        monkeypatch.setitem(STYLES, name, STYLES["3d"])  # no SVG, so no renderer is needed
    monkeypatch.setattr(images, "NAME_TABLES", ())
    assert build_images(tmp_path / "out", 8, cache=cache) == 5
    assert "needs apt-get" in capsys.readouterr().err
    with pytest.raises(VisarError, match="needs apt-get"):
        build_images(tmp_path / "other", 8, styles=("rendered",), cache=cache)
    (cache / STYLES["3d"].package.file).unlink()
    with pytest.raises(VisarError, match="needs npm"):
        build_images(tmp_path / "other", 8, cache=cache)
    assert not (tmp_path / "other").exists()


def test_bad_requests(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(VisarError, match="Did you mean 'noto'"):
        build_images(tmp_path / "out", styles=("notto",), cache=cache)
    with pytest.raises(VisarError, match="at least 1 pixel"):
        build_images(tmp_path / "out", 0, cache=cache)
    with pytest.raises(VisarError, match="a folder that is new or empty"):
        build_images(cache, cache=cache)


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_fetch_checks_what_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("@some/art", "1.0.0", sha256(b"art\n").hexdigest())
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cache = tmp_path / "cache"
    tool(tmp_path, "npm", "echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(VisarError, match=r"@some/art 1\.0\.0 with npm failed: npm error code E404"):
        fetch(package, cache)
    tool(tmp_path, "npm", "echo other > some-art-1.0.0.tgz")
    with pytest.raises(VisarError, match="wrong check sum"):
        fetch(package, cache)
    assert list(cache.iterdir()) == []
    tool(
        tmp_path,
        "npm",
        '[ "$*" = "pack --ignore-scripts --loglevel=error @some/art@1.0.0" ] && echo art > some-art-1.0.0.tgz',
    )
    assert fetch(package, cache).read_bytes() == b"art\n"
    tool(tmp_path, "npm", "exit 1")
    assert fetch(package, cache).name == "some-art-1.0.0.tgz"  # from the cache now


def test_members_of_archives(tmp_path: Path) -> None:
    files = {"./b/2.x": b"2", "./a/1.x": b"1", "./c": b"3"}
    (tmp_path / "p.deb").write_bytes(debian(files))
    (tmp_path / "p.tgz").write_bytes(tar(files, "w:gz"))
    for name in ("p.deb", "p.tgz"):
        assert list(members(tmp_path / name, "*.x").items()) == [("./a/1.x", b"1"), ("./b/2.x", b"2")]
    (tmp_path / "bad.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(VisarError, match="not a Debian package"):
        members(tmp_path / "bad.deb", "*")


def test_the_table_is_whole() -> None:
    packages = [EMOJI_TEXT, *(s.package for s in STYLES.values())]
    assert all(len(p.sha256) == 64 and p.version for p in packages)
    assert all(s.codes_of in {"", *STYLES} and s.kind in {"icons", "files", "furniture"} for s in STYLES.values())
