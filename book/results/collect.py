"""Keep the numbers that the book and the README print: python book/results/collect.py, after ``make book``.

Writes every number that a chapter puts into its text (through ``glue``) to <chapter>.json beside this file, and the
table of results into README.md. The tests compare both with what the next build prints.
"""

import json
from pathlib import Path

import nbformat
import pandas as pd

from adalfl_lite.experiments import METHODS, final_errors
from adalfl_lite.files import atomic_path
from analysis.statistics import summarise

HERE = Path(__file__).parent
EXECUTED = HERE.parent / "_build" / "jupyter_execute"
README = HERE.parents[1] / "README.md"
RECORD = "application/papermill.record/text/plain"
MARKS = ("<!-- results -->\n", "<!-- /results -->")


def glued(notebook: Path) -> dict[str, float]:
    """The numbers that an executed chapter put into its text, by name."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return {
        output.metadata.scrapbook.name: float(output.data[RECORD])
        for output in outputs
        if "scrapbook" in output.get("metadata", {})
    }


def results_table() -> str:
    """Mean test errors with intervals, methods in rows and tasks in columns, as Markdown."""
    files = [HERE / "bundled.parquet", HERE / "mnist.parquet"]
    summary = summarise(final_errors(pd.concat(map(pd.read_parquet, files), ignore_index=True)))
    cells = summary.assign(cell=[f"{r.mean:.4f} [{r.low:.4f}, {r.high:.4f}]" for r in summary.itertuples()])
    table = cells.pivot(index="method", columns="task", values="cell").fillna("")
    table = table.loc[[method for method in METHODS if method in table.index], list(summary.task.unique())]
    header = ["method", *table.columns]
    lines = [header, ["---"] * len(header), *table.itertuples(name=None)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Write all of it."""
    for notebook in sorted(EXECUTED.glob("*.ipynb")):
        if numbers := glued(notebook):
            with atomic_path(HERE / f"{notebook.stem}.json") as temporary:
                temporary.write_text(json.dumps(numbers, indent=1) + "\n")
    before, rest = README.read_text().split(MARKS[0])
    with atomic_path(README) as temporary:
        temporary.write_text(before + MARKS[0] + results_table() + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
