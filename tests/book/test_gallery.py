"""The gallery shows every plot function from one line, and the table of features leaves out nothing of `analysis`."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import analysis

BOOK = Path(__file__).parents[2] / "book"
FORMER = set(analysis.NAMES["former"].split())
FUNCTIONS = [name for name in analysis.__all__ if name not in FORMER and inspect.isfunction(getattr(analysis, name))]
PLOTS = [name for name in FUNCTIONS if name.startswith("plot_")]
FIGURE = re.compile(r"^### `(\w+)`\n\n```\{code-cell\} ipython3\n---\n(.*?)---\n(.*?)```", re.M | re.S)


@pytest.fixture(scope="module")
def figures() -> dict[str, tuple[str, str]]:
    """{plot function: (its options, its code)} of the gallery."""
    return {name: (options, code) for name, options, code in FIGURE.findall((BOOK / "gallery.md").read_text("utf-8"))}


@pytest.fixture(scope="module")
def features() -> list[list[str]]:
    """The rows of the tables of features, cell by cell."""
    lines = (BOOK / "diagnostics.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "What"]


def test_there_is_something_to_test():
    assert len(PLOTS) > 10 and len(FUNCTIONS) > 50


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_function_has_a_figure_from_one_line(name, figures):
    options, code = figures[name]
    (statement,) = ast.parse(code).body
    assert ast.unparse(statement).startswith(f"{name}(") and code.strip().endswith(";") and len(code.splitlines()) == 1
    assert "caption: " in options and "alt: " in options


def test_the_gallery_shows_nothing_else(figures):
    assert set(figures) == set(PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_function_has_an_example_of_one_line(name):
    docstring = inspect.getdoc(getattr(analysis, name))
    assert re.search(rf"^\s*>>> .*\b{name}\(.*\)", docstring, re.M)


def test_every_row_is_filled(features):
    assert len(features) > 20
    for row in features:
        assert len(row) == 4 and all(row), row


def test_every_function_is_in_the_table_and_every_name_there_exists(features):
    named = {name for row in features for name in re.findall(r"`(\w+)`", row[1])}
    assert set(FUNCTIONS) <= named <= set(analysis.__all__)
