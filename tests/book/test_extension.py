"""The notebooks that the book offers: what they do first where there is no checkout, and the button that opens them."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("notebooks", ROOT / "book" / "_ext" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)


@pytest.mark.parametrize("repository", [None, "someone/a-fork"])
def test_a_published_notebook_fetches_what_its_chapter_reads_and_has_a_button(tmp_path, monkeypatch, repository):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    if repository:
        monkeypatch.setenv("GITHUB_REPOSITORY", repository)
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    (tmp_path / "jupyter_execute").mkdir()
    nbformat.write(executed, tmp_path / "jupyter_execute" / "ml3.ipynb")
    app, context = SimpleNamespace(outdir=str(tmp_path / "html")), {"header_buttons": [], "script_files": ["thebe.js"]}
    notebooks.add_notebook(app, "ml3", "page.html", context, None)
    notebooks.finish_page(app, "ml3", "page.html", context, None)
    cells = [cell.source for cell in nbformat.read(tmp_path / "html" / "_sources" / "ml3.ipynb", as_version=4).cells]
    assert cells[-1] == "1 + 1" and context["script_files"] == []
    if repository is None:
        assert len(cells) == 1 and not context["header_buttons"]
        return
    clone, place, install = cells[0].splitlines()
    assert clone.endswith(f"https://github.com/{repository}") and place == "%cd a-fork/book"
    assert install.endswith("'..[book]'")
    (button,) = context["header_buttons"]
    assert f"/{repository}/blob/gh-pages/_sources/ml3.ipynb" in button["url"]
