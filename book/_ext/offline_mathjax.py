"""Serve MathJax from the book itself, so that formulas need no network.

The files come from the `sphinx-mathjax-offline` package. Its own extension picks the CHTML output, which needs fonts
beside it, and copies all of its 24 MB; the SVG output with every TeX extension is one file, and the rest is what its
accessibility menu loads.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.fileutil import copy_asset

MAIN = "tex-svg-full.js"
FOLDERS = ("a11y", "sre")


def copy_mathjax(source: Path, app: Sphinx, exception: Exception | None) -> None:
    """Copy MathJax into the static files of a finished HTML build."""
    if exception is not None or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "mathjax"
    copy_asset(str(source / MAIN), str(target))
    for folder in FOLDERS:
        copy_asset(str(source / folder), str(target / folder))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    package = find_spec("sphinx-mathjax-offline")
    if package is None or package.origin is None:
        raise ExtensionError("the book needs the package sphinx-mathjax-offline: pip install -e '.[book]'")
    app.connect("config-inited", lambda app, config: setattr(config, "mathjax_path", f"mathjax/{MAIN}"))
    app.connect("build-finished", partial(copy_mathjax, Path(package.origin).parent / "static" / "mathjax"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
