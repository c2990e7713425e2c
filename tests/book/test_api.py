"""The reference: every public name of both packages has its entry on the built page, with its words."""

import importlib
import os
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

HTML = Path(__file__).parents[2] / "book" / "_build" / "html"
PACKAGES = ("adalfl_lite", "analysis")


@pytest.fixture(scope="module", params=PACKAGES)
def reference(request) -> tuple[str, BeautifulSoup]:
    """A package's name, and its page of the reference."""
    page = HTML / f"api_{request.param}.html"
    if not page.is_file():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the book is not built: run `make book` first")
    return request.param, BeautifulSoup(page.read_text(), "html.parser")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_listed_once(package):
    names = importlib.import_module(package).__all__
    assert len(names) == len(set(names))


def test_every_public_name_is_described(reference):
    package, page = reference
    module = importlib.import_module(package)
    for name in module.__all__:
        entry = page.find("dt", id=f"{getattr(module, name).__module__}.{name}")
        assert entry is not None, f"{package}.{name} is not in the reference"
        assert len(entry.find_next_sibling("dd").get_text(" ").split()) >= 3, f"{package}.{name} is not described"


def test_docstrings_became_no_errors_on_the_page(reference):
    _, page = reference
    assert not page.select(".system-message, .problematic")
    assert not [text for text in page.stripped_strings if ":func:`" in text or ":class:`" in text]
