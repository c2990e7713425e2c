"""Tables of a comparison as papers print them: methods down, tasks across, mean ± interval, best in bold, paired tests.

A cell is the mean over seeds ± half the width of its bootstrap interval. An arrow says that a method is lower (↓) or
higher (↑) than the reference method on the same seeds, by Wilcoxon's signed-rank test with Holm's correction over the
methods of a task, p < 1 − confidence; at 95 % fewer than six seeds never earn one. Its direction is that of the ranks,
which a single large difference does not turn as it can turn the mean. A method of which runs diverged is not the best
and not tested: the mean of those that did not says too little.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inputs import require_columns
from analysis.statistics import check_runs, holm, signed_ranks, summarise


@dataclass(frozen=True)
class _Format:
    """How a format writes the parts of a table."""

    escape: Callable[[str], str]
    bold: Callable[[str], str]
    plus_minus: str
    arrows: dict[str, str]
    table: Callable[[list[str], list[list[str]], str], str]


def comparison_table(
    runs: pd.DataFrame, reference: str = "handcrafted", value: str = "test_error", confidence: float = 0.95
) -> pd.DataFrame:
    """The numbers of a table.

    Args:
        runs: one row per task, method and seed with the columns ``task``, ``method``, ``seed`` and ``value``, where a
            run that diverged has an infinite value or NaN. Lower is better.
        reference: the method that the others are tested against; a task without it has no tests.
        value: the column to compare.
        confidence: of the intervals, and one less the level of the tests.

    Returns:
        One row per task and method: task, method, mean, low, high, n (runs that did not diverge), diverged (runs that
        did), best (the lowest mean of its task), and arrow ("lower", "higher" or "").

    Raises:
        ValueError: a missing column, no rows, or a seed twice.
    """
    require_columns(runs, "task", "method", "seed", value)
    labels = runs[["task", "method", "seed", value]]
    check_runs(labels.assign(**{value: 0.0}), ["task", "method"], value)
    finite = np.isfinite(labels[value].astype(float))
    diverged = (~finite).groupby([labels.task, labels.method]).sum()
    summary = summarise(labels[finite], value=value, confidence=confidence) if finite.any() else pd.DataFrame()
    rows = []
    for task, group in labels.groupby("task", sort=False):
        means = {} if summary.empty else summary[summary.task == task].set_index("method").to_dict("index")
        whole = [m for m in group.method.unique() if m in means and not diverged[task, m]]
        arrows = _arrows(group[group.method.isin(whole)], reference, value, confidence)
        best = min((means[m]["mean"] for m in whole), default=math.nan)
        for method in group.method.unique():
            found = means.get(method, {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0})
            rows.append(
                {
                    "task": task,
                    "method": method,
                    **{name: found[name] for name in ("mean", "low", "high", "n")},
                    "diverged": int(diverged[task, method]),
                    "best": method in whole and found["mean"] == best,
                    "arrow": arrows.get(method, ""),
                }
            )
    return pd.DataFrame(rows)


def render(table: pd.DataFrame, format: str = "markdown", caption: str = "") -> str:
    """Write what :func:`comparison_table` gave.

    Args:
        table: the numbers.
        format: "markdown", "latex" (a tabular with the rules of the package booktabs) or "html".
        caption: a line of plain text to go with it.

    Raises:
        ValueError: another format.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    style = FORMATS[format]
    tasks = list(table.task.unique())
    cells = {(row.task, row.method): _cell(row, style) for row in table.itertuples()}
    body = [
        [style.escape(method), *(cells.get((task, method), "") for task in tasks)] for method in table.method.unique()
    ]
    return style.table(["method", *map(style.escape, tasks)], body, style.escape(caption))


def _arrows(group: pd.DataFrame, reference: str, value: str, confidence: float) -> dict[str, str]:
    """Methods of one task that differ from the reference, by Wilcoxon's test with Holm's correction, and how."""
    errors = group.pivot(index="seed", columns="method", values=value).astype(float)
    if reference not in errors:
        return {}
    pairs = {m: errors[[m, reference]].dropna().to_numpy().T for m in errors if m != reference}
    tests = {m: signed_ranks(*pair) for m, pair in pairs.items() if len(pair[0]) > 1}
    adjusted = dict(zip(tests, holm([test.pvalue for test in tests.values()]), strict=True))
    return {m: "lower" if tests[m].balance < 0 else "higher" for m in tests if adjusted[m] < 1 - confidence}


def _cell(row: tuple, style: _Format) -> str:
    mean, low, high, arrow = (getattr(row, name) for name in ("mean", "low", "high", "arrow"))
    text = "–" if math.isnan(mean) else f"{mean:.4f}"
    text = style.bold(text) if getattr(row, "best", False) else text
    if not math.isnan(low):
        text += f" {style.plus_minus} {(high - low) / 2:.4f}"
    text += f" {style.arrows[arrow]}" if arrow else ""
    count = getattr(row, "diverged", 0)
    return text + (f" ({count} diverged)" if count else "")


def markdown(header: list[str], body: list[list[str]], caption: str = "") -> str:
    """A table of text in Markdown: the first column to the left, the others to the right; a caption below it."""
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + (f"\n\n{caption}" if caption else "") + "\n"


def _latex(header: list[str], body: list[list[str]], caption: str) -> str:
    lines = [" & ".join(row) + r" \\" for row in (header, *body)]
    rule = [r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule", lines[0], r"\midrule"]
    note = [f"% {caption}"] if caption else []
    return "\n".join([*note, *rule, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _html(header: list[str], body: list[list[str]], caption: str) -> str:
    title = f"<caption>{caption}</caption>\n" if caption else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    rows = [
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in body
    ]
    inner = "\n".join(rows)
    return f"<table>\n{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{inner}\n</tbody>\n</table>\n"


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {letter: f"\\{letter}" for letter in "_%&#${}"}


def _escape_latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


FORMATS = {
    "markdown": _Format(
        escape=lambda text: text.replace("|", r"\|"),
        bold=lambda text: f"**{text}**",
        plus_minus="±",
        arrows={"lower": "↓", "higher": "↑"},
        table=markdown,
    ),
    "latex": _Format(
        escape=_escape_latex,
        bold=lambda text: rf"\textbf{{{text}}}",
        plus_minus=r"$\pm$",
        arrows={"lower": r"$\downarrow$", "higher": r"$\uparrow$"},
        table=_latex,
    ),
    "html": _Format(
        escape=html.escape,
        bold=lambda text: f"<strong>{text}</strong>",
        plus_minus="±",
        arrows={"lower": "↓", "higher": "↑"},
        table=_html,
    ),
}
