"""Compare learned losses and controls on every task: python book/results/comparison.py [--tasks iris] [--root DATA]

Each finished run is a file in --folder, which a rerun skips; all of them together become comparison.parquet beside this
file. The runs that are in it count as finished, but with --anew those of the given tasks and methods. Small models
train all seeds as one program, so a task takes a quarter of an hour on one core; on MNIST a seed of LeNet-5 takes 30
minutes and one of the MLP 45.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from script import HERE, arguments, begin, note

from adalfl_lite.compare import METHODS, Task, compare, get_task, read_results, write_results
from adalfl_lite.compare.grid import job_path

LARGE = ("mlp", "lenet5")  # models that gain nothing from training their seeds as one program
CHOSEN = (
    *("handcrafted", "handcrafted-tuned", "handcrafted-all", "handcrafted-long", "label-smoothing-tuned"),
    *("rate-offline", "rate-online", "ml3", "offline", "online", "online-train"),
)
SEEDS = 10
TASKS = {
    task.name: task
    for task in (
        *map(get_task, ("digits", "iris", "wine", "breast_cancer", "diabetes", "communities", "california")),
        *(get_task(name).with_(steps=3000) for name in ("mnist-linear", "mnist-mlp", "mnist-lenet5")),
    )
}


def methods(task: Task) -> list[str]:
    """The names of the compared methods that suit the task."""
    return [name for name in CHOSEN if task.kind in METHODS[name].kinds]


def take_up(stored: Path, folder: Path, anew: list[str], methods: list[str]) -> None:
    """Let the stored runs count as finished, but those of the tasks and methods that are made anew."""
    for (name, method, seed), rows in read_results(stored).groupby(["task", "method", "seed"]):
        path = job_path(folder, name, method, seed)
        if not (name in anew and method in methods) and not path.exists():
            write_results(rows, path)


def run(task: Task, chosen: Sequence[str], seeds: Sequence[int], folder: Path, root: str | None = None) -> None:
    """Make the runs of a task that have no file yet."""
    names = [name for name in methods(task) if name in chosen]
    compare([task], names, seeds, folder=folder, root=root, together=task.model not in LARGE, progress=False)
    print(task.name, *names, flush=True)


def finished(folder: Path) -> pd.DataFrame:
    """All runs that have a file, task by task."""
    files = [path for name in TASKS for path in sorted(folder.glob(f"{name}--*.parquet"))]
    return pd.concat(map(read_results, files), ignore_index=True)


if __name__ == "__main__":
    parser = arguments(__doc__, root=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=CHOSEN, default=list(CHOSEN), help="by default all that apply")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--anew", action="store_true", help="make again what is stored of these tasks and methods")
    parser.add_argument("--folder", type=Path, default=Path("results/comparison"))
    options = begin(parser)
    stored = HERE / "comparison.parquet"
    take_up(stored, options.folder, options.tasks if options.anew else [], options.methods)
    for name in options.tasks:
        run(TASKS[name], options.methods, range(options.seeds), options.folder, options.root)
    write_results(finished(options.folder), stored)
    note(stored)
