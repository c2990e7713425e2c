"""Docstrings that read well as plain text, made to read well as pages.

In a docstring of ours an equation, a diagram or a line of code stands indented between empty lines, which
reStructuredText takes for a quotation, and |x| is an absolute value, which it takes for a substitution. A number of an
equation stands at the right margin, which a phone does not reach. And what napoleon takes for the type of an attribute,
all that its first line has before a colon, is a part of its sentence.
"""

import re
from typing import Any

from sphinx.application import Sphinx

ALIASES = """ArrayLike Activated Batch Callback Data Diagnostic Direction Expression Gradients Kind Loss MakeModel
MakeOptimizer Output PairLoss Pointwise Pullback State Tangents Validate""".split()  # types to be shown by name
SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:", "Examples:")


def mend(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make indented blocks above the first section literal, escape bars elsewhere, and keep sentences whole."""
    mended: list[str] = []
    body, literal, before = True, False, ""  # above the sections; in a block; the last line that is not empty
    for line in lines:
        body = body and line.strip() not in SECTIONS
        if line.strip() and not line.startswith("    "):
            literal = False
        if body and line.startswith("    ") and mended and not mended[-1].strip() and not literal:
            literal = before.endswith("::") or not before.startswith((" ", "..", "- "))
            if literal and not before.endswith("::"):
                mended += [".. code-block:: none", ""]
        mended.append(re.sub(r" {4,}(\(\d+\))$", r"    \1", line) if literal else line.replace("|", r"\|"))
        before = line if line.strip() else before
    lines[:] = [r"\ ", *mended] if what in ("attribute", "data", "property") and mended else mended


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which only say that they are fields."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx; at this event it comes before napoleon."""
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.connect(
        "config-inited", lambda app, config: config.autodoc_type_aliases.update(zip(ALIASES, ALIASES, strict=True))
    )
    app.connect("autodoc-process-docstring", mend, priority=100)
    app.connect("autodoc-skip-member", leave_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
