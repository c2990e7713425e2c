"""Measure how near to divergence a learned loss walks: python book/results/curvature.py

On digits, for every seed, the model is trained with the task loss, with the task loss at ten times the learning rate
and with online AdaLFL, from the same weights. Twenty times along the way the largest eigenvalues of the Hessians of the
loss it is trained with and of the task loss are measured on training rows. One row for each moment, in
curvature.parquet beside this file; ``limit`` is the curvature from which the optimizer diverges on a quadratic.
"""

from collections.abc import Sequence

import pandas as pd
from script import HERE, arguments, begin, save

from adalfl_lite.compare import METHODS, Method, Task, get_task, prepare, train
from adalfl_lite.losses import task_loss
from analysis.curvature import top_eigenpairs

STEPS, ROWS = 400, 300


def measure(task: Task, seeds: Sequence[int], online: Method = METHODS["online"], rows: int = ROWS) -> pd.DataFrame:
    """Train three ways with every seed, and look at both curvatures along the way."""
    fast = task.with_(learning_rate=10 * task.learning_rate)
    data = [task.load(seed=seed) for seed in seeds]
    trainings = {
        "cross-entropy": ("handcrafted", prepare(task, data, "handcrafted", seeds)),
        "cross-entropy, rate x 10": ("handcrafted", prepare(fast, data, "handcrafted", seeds)),
        "learned": (online, prepare(task, data, online, seeds)),
    }
    found: list[dict] = []
    for i, seed in enumerate(seeds):
        for name, (method, prepared) in trainings.items():
            batch, plain, settings = data[i].train[:rows], task_loss(task.kind), prepared[i].task
            limit = 2 * (1 + settings.momentum) / settings.learning_rate

            def record(step, model, loss, seed=seed, name=name, batch=batch, plain=plain, limit=limit):
                """Measure the curvature of both losses here."""
                own, of_task = (top_eigenpairs(model, each, batch).values[0] for each in (loss, plain))
                row = {"seed": seed, "method": name, "step": step, "own": own, "task_loss": of_task, "limit": limit}
                found.append(row)

            train([prepared[i]], method, [seed], callback=record)
            print(seed, name, f"{found[-1]['own']:.2f} {found[-1]['own'] / limit:.3f}", flush=True)
    return pd.DataFrame(found)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    options = begin(parser)
    save(measure(get_task("digits").with_(steps=STEPS), range(options.seeds)), HERE / "curvature.parquet")
