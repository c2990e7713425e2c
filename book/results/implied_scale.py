"""Measure how hard the learned loss pushes on California Housing: python book/results/implied_scale.py [--root DATA]

For every seed the model is trained with online AdaLFL, as in comparison.py, and twenty times along the way the gradient
of its loss is compared with that of the squared error on training rows, ∇M = c ∇L + r. One row for each moment, in
implied_scale.parquet beside this file.
"""

from collections.abc import Sequence

import pandas as pd
import torch.nn.functional as F
from script import HERE, arguments, begin, save

from adalfl_lite.compare import METHODS, Method, Task, get_task, prepare, train
from analysis.effective_lr import effective_learning_rate

ROWS = 2000


def measure(
    task: Task, seeds: Sequence[int], online: Method = METHODS["online"], root: str | None = None
) -> pd.DataFrame:
    """Train online with every seed, and compare the two gradients along the way."""
    data = [task.load(seed=seed, root=root) for seed in seeds]
    rows: list[dict] = []
    for seed, one, prepared in zip(seeds, data, prepare(task, data, online, seeds), strict=True):

        def record(step, model, loss, seed=seed, batch=one.train[:ROWS]):
            """Compare the two gradients on the same rows."""
            found = effective_learning_rate(model, loss, F.mse_loss, batch)
            rows.append({"task": task.name, "seed": seed, "step": step, **vars(found)})

        error = train([prepared], online, [seed], callback=record).test_error.iloc[-1]
        print(seed, f"{rows[-1]['scale']:.4f} {error:.4f}", flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = arguments(__doc__, root=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = begin(parser)
    save(measure(get_task("california"), range(options.seeds), root=options.root), HERE / "implied_scale.parquet")
