"""Keep the numbers that the book and the README print: python book/results/collect.py, after ``make book``.

Writes every number that a chapter puts into its text (through ``glue``) to <chapter>.json beside this file, and the
tables of results and of speed into README.md. The tests compare both with what the next build prints.
"""

import json

import pandas as pd
from names import MODELS, PEERS
from script import HERE, note

from adalfl_lite.compare import final_errors, tied
from adalfl_lite.files import atomic_path
from analysis.statistics import summarise
from analysis.tables import markdown

EXECUTED = HERE.parent / "_build" / "jupyter_execute"
README = HERE.parents[1] / "README.md"
STEPS = HERE.parents[1] / "benchmarks" / "results" / "step.json"
SHOWN = ["handcrafted", "handcrafted-tuned", "ml3", "offline", "online"]


def glued(chapter: str) -> dict[str, float]:
    """The numbers that the last build of a chapter put into its text, by name."""
    entries = json.loads((EXECUTED / f"{chapter}.glue.json").read_text())
    return {name: float(entry["data"]["text/plain"]) for name, entry in entries.items()}


def chapters() -> list[str]:
    """The chapters of the last build that put numbers into their text."""
    return sorted(path.name.removesuffix(".glue.json") for path in EXECUTED.glob("*.glue.json"))


def results_table() -> str:
    """Mean test errors with intervals, tasks in rows and the main methods in columns, as Markdown."""
    final = final_errors(tied(pd.read_parquet(HERE / "comparison.parquet")))
    summary = summarise(final[final.method.isin(SHOWN)])
    cells = summary.assign(cell=[f"{r.mean:.4f} [{r.low:.4f}, {r.high:.4f}]" for r in summary.itertuples()])
    table = cells.pivot(index="task", columns="method", values="cell").loc[summary.task.unique(), SHOWN]
    table.insert(0, "seeds", final.groupby("task").seed.nunique().astype(str))
    return markdown(["task", *table.columns], [list(row) for row in table.itertuples(name=None)])


def speed_table() -> str:
    """The cost of a meta step in plain steps: ours, and the fastest peer's, as Markdown."""
    steps = pd.DataFrame(json.loads(STEPS.read_text())["rows"])
    ratios = steps.pivot(index="model", columns="engine", values="time_ratio")
    exact = steps[steps.engine == "forward"].set_index("model")
    lines = []
    for model, name in MODELS.items():
        if model not in ratios.index:
            continue
        ours, peers = ratios.loc[model], ratios.loc[model, ratios.columns.intersection(PEERS)].dropna()
        times = f"{peers.min() / ours.forward:.2f}"
        row = exact.loc[model]
        quartiles = f"{row.time_ratio:.2f} [{row.time_ratio_low:.2f}, {row.time_ratio_high:.2f}]"
        peer = f"{peers.min():.2f} ({peers.idxmin()})"
        lines.append([name, str(row.rounds), quartiles, f"{ours.shared:.2f}", peer, times])
    return markdown(["model", "rounds", "exact", "shared", "fastest peer", "peer / exact"], lines)


def put_into_readme(name: str, table: str) -> None:
    """Put a table between the marks of that name."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = README.read_text().split(first)
    with atomic_path(README) as temporary:
        temporary.write_text(before + first + table + last + rest.split(last)[1])


def main() -> None:
    """Write the numbers of all chapters, and both tables of the README."""
    for chapter in chapters():
        numbers = HERE / f"{chapter}.json"
        with atomic_path(numbers) as temporary:
            temporary.write_text(json.dumps(glued(chapter), indent=1) + "\n")
        note(numbers)
    put_into_readme("results", results_table())
    put_into_readme("speed", speed_table())


if __name__ == "__main__":
    main()
