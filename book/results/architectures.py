"""Learn losses with several architectures, and measure their shapes: python book/results/architectures.py

Algorithm 1 on digits from a random loss network, in rollouts of 20 steps, without imitation and rehearsals. At some
lengths the loss is drawn, and a model trained with it, frozen. The table is architectures.parquet beside this file: one
row per point of a curve, in which what belongs to the whole curve is repeated.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from script import HERE, arguments, begin, save

from adalfl_lite import Initialiser, LossNetwork, evaluate
from adalfl_lite.compare import Learned, Task, fresh, get_task
from adalfl_lite.compare.recipes import Job
from adalfl_lite.engines import plain_step
from adalfl_lite.losses import Loss
from analysis.loss_shapes import loss_curves

SEEDS = range(4)
LENGTHS = (0, 100, 200, 400, 800)
ROLLOUT = 20
TRAINING_STEPS = 400
TASK = get_task("digits")
PROBABILITIES = np.linspace(0.005, 0.995, 199)

ARCHITECTURES = {
    "softplus (ML³)": LossNetwork.ml3,
    "smooth leaky, γ = 0.01": LossNetwork.default,
    "smooth leaky, γ = 0.25": lambda kind: LossNetwork.default(kind, gamma=0.25),
}


def curves(network: LossNetwork, classes: int = 10) -> pd.DataFrame:
    """ℓ(1, p), its derivative, and B(p) = ℓ'(1, p) − ℓ'(0, (1 − p)/(C − 1)), at PROBABILITIES."""
    right = loss_curves(network, targets=[1.0], predictions=PROBABILITIES)
    wrong = loss_curves(network, targets=[0.0], predictions=np.sort((1 - PROBABILITIES) / (classes - 1)))
    right["bracket"] = right.derivative.to_numpy() - wrong.derivative.to_numpy()[::-1]
    return right.drop(columns="target")


def error_with(loss: Loss, task: Task, seed: int, steps: int) -> float:
    """Test error of a model trained with a fixed loss."""
    data = task.load(seed=seed)
    model, optimizer = fresh(task, data, seed)
    batches = data.train.batches(task.batch_size, seed=seed)
    for _ in range(steps):
        plain_step(model, loss, optimizer, next(batches))
    return evaluate(model, data.test, data.kind)[0]


def measure(
    name: str,
    network: Callable[[str], LossNetwork],
    seed: int,
    lengths: Sequence[int] = LENGTHS,
    training_steps: int = TRAINING_STEPS,
) -> pd.DataFrame:
    """Learn one loss, and look at it at some lengths: its curves, and a training with it."""
    tables = []

    def look(step: int, learned: LossNetwork) -> None:
        if step not in lengths:
            return
        frozen = learned.clone().requires_grad_(False)
        with torch.random.fork_rng():
            error = error_with(frozen, TASK, seed, training_steps)
        keys = {"network": name, "seed": seed, "meta_steps": step, "test_error": error}
        tables.append(curves(frozen).assign(**keys))
        print(*keys.values(), flush=True)

    settings = Initialiser(steps=max(lengths), imitation_steps=0, rollout_steps=ROLLOUT, rehearsals=0)
    Learned(network, settings).find(Job(TASK, TASK.load(seed=seed), seed), callback=look)
    return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    begin(arguments(__doc__))
    found = [measure(name, network, seed) for name, network in ARCHITECTURES.items() for seed in SEEDS]
    save(pd.concat(found, ignore_index=True), HERE / "architectures.parquet")
