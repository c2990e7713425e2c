"""Offer each chapter as the executed notebook: a download and, once published, a button that opens it in Colab.

The theme's own Colab button points at the chapter's Markdown source, which Colab cannot open. Ours points at the
executed notebook on the branch `gh-pages`, and appears only where the build knows its repository (GITHUB_REPOSITORY,
which GitHub's runners set). Thebe, which the theme loads although the book offers no live cells, is dropped here too.
"""

import os
from pathlib import Path
from typing import Any

import nbformat
from docutils.nodes import document
from sphinx.application import Sphinx


def set_up(repository: str) -> str:
    """What a notebook needs first where there is no checkout: the packages, and the results that chapters read."""
    return "\n".join(
        [
            f"!git clone --quiet --depth 1 https://github.com/{repository}",
            f"%cd {repository.split('/')[-1]}/book",
            "%pip install --quiet '..[book]'",
        ]
    )


def add_notebook(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: document | None) -> None:
    """Copy the executed notebook beside the page's source, where the theme's download menu looks for it."""
    executed = Path(app.outdir).parent / "jupyter_execute" / f"{page}.ipynb"
    if not executed.exists():
        return
    notebook = nbformat.read(executed, as_version=4)
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        notebook.cells.insert(0, nbformat.v4.new_code_cell(set_up(repository)))
    target = Path(app.outdir) / "_sources" / f"{page}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    context["ipynb_source"] = f"{page}.ipynb"


def finish_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: document | None) -> None:
    """Add the Colab button and drop Thebe's scripts, after the theme has done its part."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    if repository and "ipynb_source" in context:
        context["header_buttons"].insert(
            0,
            {
                "type": "link",
                "url": f"https://colab.research.google.com/github/{repository}/blob/gh-pages/_sources/{page}.ipynb",
                "text": "Colab",
                "icon": "fas fa-rocket",
                "tooltip": "Open this chapter in Colab",
                "label": "launch-colab-button",
            },
        )
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s} {getattr(s, 'attributes', '')}"]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.connect("html-page-context", add_notebook, priority=100)
    app.connect("html-page-context", finish_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
