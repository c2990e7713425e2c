"""How the reference shows types and values, and which members it leaves out.

The docstrings themselves are plain reStructuredText with the sections of Google's style.
"""

from typing import Any

from sphinx import addnodes
from sphinx.application import Sphinx

ALIASES = """ArrayLike Batch Callback Data Diagnostic Direction Evaluated Expression Gradients Kind Loss MakeModel
MakeOptimizer Output PairLoss Pointwise Pullback State TangentOf Tangents Validate""".split()  # shown by name


def keep_sentences(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let the words of an attribute begin with a phrase and a colon, which napoleon would take for a type."""
    if what in ("attribute", "data", "property") and lines:
        lines.insert(0, r"\ ")


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which only say that they are fields."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def without_long_values(app: Sphinx, domain: str, kind: str, content: Any) -> None:
    """Leave out the value of a constant that is longer than a line: a table of functions, as Python prints it."""
    for annotation in list(content.parent[0].findall(addnodes.desc_annotation)):
        if len(annotation.astext()) > 120:
            annotation.parent.remove(annotation)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx; at this event it comes before napoleon."""
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.connect(
        "config-inited", lambda app, config: config.autodoc_type_aliases.update(zip(ALIASES, ALIASES, strict=True))
    )
    app.connect("autodoc-process-docstring", keep_sentences, priority=100)
    app.connect("autodoc-skip-member", leave_out)
    app.connect("object-description-transform", without_long_values)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
