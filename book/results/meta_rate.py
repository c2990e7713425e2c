"""Compare meta learning rates of online AdaLFL on the regressions: python book/results/meta_rate.py [--tasks diabetes]

All seeds of a task are one program, from the same initialised losses for every rate; nothing else changes. One row for
each run, at its end, in meta_rate.parquet beside this file. It takes an hour on one core.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from script import HERE, arguments, begin, save

from adalfl_lite.compare import METHODS, Method, Task, get_task, prepare, train

TASKS = ("diabetes", "communities", "california")
RATES = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


def measure(
    task: Task,
    seeds: Sequence[int],
    rates: Sequence[float] = RATES,
    online: Method = METHODS["online"],
    root: str | None = None,
) -> pd.DataFrame:
    """The errors at the end of every run of a task."""
    data = [task.load(seed=seed, root=root) for seed in seeds]
    prepared, parts = prepare(task, data, online, seeds), []
    for rate in rates:
        runs = train(prepared, replace(online, meta_learning_rate=rate), seeds)
        ends = runs[runs.step == task.steps][["seed", "valid_error", "test_error"]]
        parts.append(ends.assign(task=task.name, meta_learning_rate=rate))
        print(task.name, rate, f"{ends.valid_error.mean():.4f}", flush=True)
    return pd.concat(parts, ignore_index=True)


if __name__ == "__main__":
    parser = arguments(__doc__, root=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="the rows of others stay")
    parser.add_argument("--seeds", type=int, default=10)
    options = begin(parser)
    found = [measure(get_task(name), range(options.seeds), root=options.root) for name in options.tasks]
    save(pd.concat(found, ignore_index=True), HERE / "meta_rate.parquet", tasks=options.tasks)
