"""Every chapter is a notebook: in its Markdown, as a download, and run alone from anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml

BOOK = Path(__file__).parents[2] / "book"
BUILT = BOOK / "_build" / "html"
TOC = yaml.safe_load((BOOK / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
CHAPTERS = [page for page in PAGES if (BOOK / f"{page}.md").read_text().startswith("---\njupytext:")]


def cells(notebook: nbformat.NotebookNode) -> list[tuple]:
    return [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


def test_pages_are_listed_once_and_none_is_forgotten():
    assert len(PAGES) == len(set(PAGES))
    assert "ml3" in CHAPTERS and "glossary" not in CHAPTERS


def test_headers_are_the_same():
    headers = {(BOOK / f"{chapter}.md").read_text().split("\n---\n")[0] for chapter in CHAPTERS}
    assert len(headers) == 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapters_survive_the_way_to_a_notebook_and_back(chapter):
    text = (BOOK / f"{chapter}.md").read_text()
    notebook = jupytext.reads(text, "md:myst")
    assert sum(cell.cell_type == "code" for cell in notebook.cells) == text.count("```{code-cell}")
    there = jupytext.reads(jupytext.writes(notebook, "ipynb"), "ipynb")
    back = jupytext.reads(jupytext.writes(there, "md:myst"), "md:myst")
    assert cells(there) == cells(notebook) == cells(back)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_download_is_the_executed_notebook(chapter):
    path = BUILT / "_sources" / f"{chapter}.ipynb"
    if not (BUILT / "index.html").is_file():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the book is not built: run `make book` first")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and "%pip install" not in cell.source]
    assert [cell.source for cell in code] == [
        cell.source for cell in jupytext.read(BOOK / f"{chapter}.md").cells if cell.cell_type == "code"
    ]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert f"_sources/{chapter}.ipynb" in (BUILT / f"{chapter}.html").read_text()


@pytest.mark.slow
def test_a_chapter_runs_alone_from_the_root_of_a_clone(tmp_path):
    """One that reads files beside the book and above it; a kernel starts in its notebook's folder."""
    (tmp_path / "book").mkdir()
    (tmp_path / "benchmarks").symlink_to(BOOK.parent / "benchmarks")
    (tmp_path / "book" / "results").symlink_to(BOOK / "results")
    notebook = tmp_path / "book" / "cost.ipynb"
    jupytext.write(jupytext.read(BOOK / "cost.md"), notebook)
    command = [Path(sys.executable).with_name("jupyter-execute"), "--inplace", "book/cost.ipynb"]
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=200)  # noqa: S603
    assert any(cell.get("outputs") for cell in nbformat.read(notebook, as_version=4).cells)
