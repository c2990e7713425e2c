"""Measure the short-horizon bias on digits and MNIST: python book/results/short_horizon.py [--jobs 2] [--root DATA]

For each kind of offline learning, seed and length of it: how the learned loss does at what it was trained for (the task
loss one step after), how large it is, and how it does at what it is used for (the test error of a whole training run).
Writes short_horizon.parquet beside this file.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from script import HERE, arguments, begin, save, spread

from adalfl_lite import Initialiser, LossNetwork, evaluate, initialise
from adalfl_lite.compare import Task, fresh, get_task
from adalfl_lite.compare.recipes import INITIALISATION_SEED, Job, streams
from adalfl_lite.engines import plain_step
from adalfl_lite.losses import task_loss
from analysis.effective_lr import effective_learning_rate

TASKS = {  # name: (the task, when to look, seeds)
    "digits": (get_task("digits"), (25, 50, 100, 200, 400, 800, 1600, 2500), 4),
    "mnist-lenet5": (get_task("mnist-lenet5").with_(learning_rate=0.1), (25, 100, 400, 800, 1600), 3),
}
VARIANTS = {  # name: (loss network, base steps before the model is drawn afresh)
    "ML³": (LossNetwork.ml3, 1),
    "AdaLFL's network": (LossNetwork.default, 1),
    "AdaLFL's network, 20-step rollouts": (LossNetwork.default, 20),
}
HORIZON = 600
ONE_STEP_REPEATS = 50


def measure(
    name: str,
    variant: str,
    seed: int,
    root: str | None = None,
    lengths: Sequence[int] | None = None,
    horizon: int = HORIZON,
) -> list[dict]:
    """Algorithm 1 without imitation and rehearsals; now and then, see what the loss is good for."""
    make_network, rollout_steps = VARIANTS[variant]
    task, default_lengths, _ = TASKS[name]
    lengths = lengths or default_lengths
    job = Job(task, task.load(seed=seed, root=root), seed)
    train, valid, _ = streams(job)
    rows = []

    def look(step: int, network: LossNetwork) -> None:
        if step in lengths:
            frozen = network.clone().requires_grad_(False)
            row = {"task": name, "variant": variant, "seed": seed, "meta_steps": step}
            one = one_step(frozen, task, job.data, train, valid)
            rows.append({**row, **one, **whole_run(frozen, task, job.data, seed, horizon)})

    torch.manual_seed(INITIALISATION_SEED + seed)
    settings = Initialiser(steps=max(lengths), imitation_steps=0, rollout_steps=rollout_steps, rehearsals=0)
    network = make_network("classification")
    initialise(
        network, job.make_model, train, valid, make_optimizer=task.make_optimizer, settings=settings, callback=look
    )
    return rows


def one_step(loss, task: Task, data, train, valid) -> dict:
    """The task loss on validation batches after one step from a fresh model, which is what Algorithm 1 minimises."""
    values, measured = [], task_loss(data.kind)
    for _ in range(ONE_STEP_REPEATS):
        model = task.make_model(data)
        plain_step(model, loss, task.make_optimizer(model.parameters()), next(train))
        inputs, targets = next(valid)
        with torch.no_grad():
            values.append(measured(model(inputs), targets).item())
    return {"one_step_loss": sum(values) / len(values)}


def whole_run(loss, task: Task, data, seed: int, horizon: int) -> dict:
    """How large the loss is for a fresh model, and the test error of training with it."""
    model, optimizer = fresh(task, data, seed)
    batches = data.train.batches(task.batch_size, seed=seed)
    scale = effective_learning_rate(model, loss, task_loss(data.kind), next(batches)).scale
    for _ in range(horizon):
        plain_step(model, loss, optimizer, next(batches))
    return {"scale": scale, "test_error": evaluate(model, data.test, data.kind)[0]}


if __name__ == "__main__":
    parser = arguments(__doc__, root=True, jobs=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="the rows of others stay")
    options = begin(parser)
    grid = [(name, v, seed, options.root) for name in options.tasks for seed in range(TASKS[name][2]) for v in VARIANTS]
    table = pd.DataFrame([row for rows in spread(measure, grid, options.jobs) for row in rows])
    save(table, HERE / "short_horizon.parquet", tasks=options.tasks)
    columns = ["one_step_loss", "scale", "test_error"]
    print(table.groupby(["task", "variant", "meta_steps"], sort=False)[columns].mean().to_string())
