"""Links: the settings in an address are validated like any input of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from visar.demo.links import FIELDS, LONGEST, link_of, opened
from visar.demo.models import DemoModel, named
from visar.demo.requests import Limits
from visar.errors import VisarError
from visar.pipelines import TextToImagePipeline


@pytest.fixture(scope="module")
def models(text_folder: Path) -> dict[str, DemoModel]:
    return dict(named([("text", TextToImagePipeline.from_pretrained(text_folder))]))


@pytest.mark.parametrize(
    "query", ["?prompt=a+cat&seed=3&sampler=gsd&sampler.group=3", "?prompt=a+cat&first=ar&second=sjd"]
)
def test_a_link_gives_its_request_again(models: dict[str, DemoModel], query: str) -> None:
    found = opened(query, models, Limits())
    assert found is not None and found[1] == ("first" in query)
    again = opened(link_of(found[0]), models, Limits())
    assert again is not None and again[0].recipe() == found[0].recipe()


def test_an_address_of_nothing_is_none(models: dict[str, DemoModel]) -> None:
    assert opened("", models, Limits()) is None and opened("?__theme=dark", models, Limits()) is None


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?seed=-1", "Seed must be"),
        ("?seed=x&prompt=a", "Seed must be"),
        ("?images=99", "number of images must be"),
        ("?sampler=a.py:B", "Unknown sampler"),
        ("?first=a.py:B&prompt=a", "Unknown sampler"),
        ("?sampler=gsd&sampler.group=-1", "group must be"),
        ("?model=../x", "no model"),
        ("?x=1", "no setting 'x'"),
        ("?seed=1&seed=2", "twice"),
        ("?seed=1", "The prompt is empty"),
        ("?prompt=" + "a" * LONGEST, "at most"),
        ("?" + "&".join(f"x{n}=1" for n in range(FIELDS + 1)), "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_link_is_said(models: dict[str, DemoModel], query: str, said: str) -> None:
    with pytest.raises(VisarError, match=said):
        opened(query, models, Limits())
