"""Keep the numbers that the book and the README print: python book/results/collect.py, after ``make book``.

Writes every number that a chapter puts into its text (through ``glue``) to <chapter>.json beside this file, and the
table of results into README.md. The tests compare both with what the next build prints.
"""

import json
from pathlib import Path

import pandas as pd

from adalfl_lite.experiments import METHODS, final_errors
from adalfl_lite.files import atomic_path
from analysis.statistics import summarise

HERE = Path(__file__).parent
EXECUTED = HERE.parent / "_build" / "jupyter_execute"
README = HERE.parents[1] / "README.md"
MARKS = ("<!-- results -->\n", "<!-- /results -->")


def glued(chapter: str) -> dict[str, float]:
    """The numbers that the last build of a chapter put into its text, by name."""
    entries = json.loads((EXECUTED / f"{chapter}.glue.json").read_text())
    return {name: float(entry["data"]["text/plain"]) for name, entry in entries.items()}


def chapters() -> list[str]:
    """The chapters of the last build that put numbers into their text."""
    return sorted(path.name.removesuffix(".glue.json") for path in EXECUTED.glob("*.glue.json"))


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
    for chapter in chapters():
        with atomic_path(HERE / f"{chapter}.json") as temporary:
            temporary.write_text(json.dumps(glued(chapter), indent=1) + "\n")
    before, rest = README.read_text().split(MARKS[0])
    with atomic_path(README) as temporary:
        temporary.write_text(before + MARKS[0] + results_table() + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
