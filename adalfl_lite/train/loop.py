"""``fit``: run a learner over data, with history, evaluation, checkpoints, resume.

On the CPU the same seed gives the same bits on the same machine, with the same number of threads. On a GPU some kernels
add in an order that changes from run to run (cuDNN's backward convolutions, and backward passes that scatter), so runs
differ in the last bits and, training being chaotic, more and more. ``torch.use_deterministic_algorithms(True)``, with
the environment variable ``CUBLAS_WORKSPACE_CONFIG=:4096:8``, has torch choose kernels that do not, or say which lack.
"""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from adalfl_lite.checks import check_counts, check_finite, check_functions, check_used, is_whole
from adalfl_lite.data.dataset import Dataset
from adalfl_lite.files import check_writable
from adalfl_lite.learn.base import Learner
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.losses.task import Loss
from adalfl_lite.passes import kept_modes
from adalfl_lite.provenance import describe_function, describe_schedule
from adalfl_lite.train.checkpoint import describe_data, resume_checkpoint, save_checkpoint
from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.streams import META_BATCHES, Streams

POLICIES = ("raise", "skip", "restore")
MAX_UNDONE = 10
"""So many steps between two evaluations may be undone before training stops."""

Callback = Callable[[int, nn.Module, Loss], None]
"""Called as (step, model, loss) at every evaluation, step 0 included."""


def fit(
    learner: Learner,
    data: Dataset | Sequence[Dataset],
    *,
    steps: int,
    batch_size: int = 100,
    meta_batches: str = "valid",
    scheduler: LRScheduler | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int | Sequence[int] = 0,
    evaluate_every: int | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    on_divergence: str = "raise",
    progress: bool = True,
) -> pd.DataFrame:
    """Train the learner's model, or models, in place and return the history.

    Args:
        learner: a model with what it is trained with: :class:`~adalfl_lite.learn.Plain` for a loss as it is,
            :class:`~adalfl_lite.learn.OnlineLoss` (Algorithm 2), :class:`~adalfl_lite.learn.OnlineLearningRate`
            (Algorithm 4), or S of one of them :class:`~adalfl_lite.learn.Stacked`.
        data: train, valid and test splits; the model never trains on the test split. For a stack one for all, or S of
            equal sizes.
        steps: base steps T.
        batch_size: rows per training batch, and per meta batch where its split has as many.
        meta_batches: "valid"; "train" to adapt on training rows alone (the paper allows both); or "next", where the
            meta batch of a step is the training batch of the next one, so that ``engine="shared"`` saves a pass.
        scheduler: over ``learner.optimizer``, advanced after every step; such as torch's ``MultiStepLR``, or the
            recorded schedule of another run, :func:`~adalfl_lite.learn.learning_rate.scaled_schedule`.
        augment: changes the inputs of a training batch at random, such as
            :func:`~adalfl_lite.data.crop_and_flip`; batches of the valid split stay as they are.
        seed: seeds the order of the batches, S of them for a stack; seed torch yourself before drawing the model.
        evaluate_every: steps between evaluations; a twentieth of the run by default.
        callback: called at every evaluation with (step, model, loss), for each model.
        checkpoint: file to save to at every evaluation and, if it exists, to resume from, bit for bit on the CPU (but
            for dropout where ``engine="shared"`` and ``augment`` meet); a finished run is returned as it was. What the
            learner holds is then the file's. Run it with the same arguments: others are refused, but for the device,
            ``compile`` and one exact engine instead of another, which round differently.
        on_divergence: what to do about a step that is not finite. "raise" stops; the checkpoint keeps the last
            evaluation. "skip" undoes the step (of a stack: of all its models), and "restore" goes back to the last
            evaluation; both warn, go on with the next batch, and stop at the eleventh such step between two
            evaluations. They cost a look at the parameters per step, and "skip" a copy of them.
        progress: show a progress bar.

    Returns:
        One row per evaluation: step, train_loss (mean of the loss trained with, since the last row), meta_loss (mean
        L_T on meta batches, where something is learned beside the model), valid_error, valid_loss, test_error,
        test_loss (L_T), learning_rate (of the first parameter group), seconds (training alone, evaluation excluded).
        Errors are rates in [0, 1] or mean squared errors. Of a stack, the histories of the S runs below each other,
        with a first column ``seed``; seconds are the program's.

    Raises:
        ValueError: arguments that do not fit together, or that would have no effect, or a checkpoint of another run.
        TypeError: the data are no :class:`~adalfl_lite.data.Dataset`.
        OSError: the checkpoint cannot be written.
        FloatingPointError: the loss, a parameter or a meta-gradient is not finite; step and tensor are named, and the
            last checkpoint is kept.
    """
    check_counts(steps=steps, batch_size=batch_size, evaluate_every=1 if evaluate_every is None else evaluate_every)
    check_functions(augment=augment, callback=callback)
    datasets, seeds = _one_each(learner, data, seed)
    several = isinstance(seed, Sequence)
    _check_policies(learner, datasets, meta_batches, scheduler, augment, on_divergence)
    if checkpoint is not None:
        check_writable(checkpoint)
    device = next(learner.models[0].parameters()).device
    run = _Run(
        learner,
        datasets,
        Streams(datasets, seeds, batch_size, meta_batches, augment, device, learner.collate),
        scheduler=scheduler,
        seeds=list(seeds) if several else None,
        callback=callback,
    )
    steps, evaluate_every = int(steps), int(evaluate_every or max(1, steps // 20))
    described = {
        **describe_data(*datasets),
        **learner.describe(),
        "steps": steps,
        "batch_size": batch_size,
        **describe_function("augment", augment),
        "scheduler": describe_schedule(scheduler, steps),
        **({"seeds": list(seeds)} if several else {"seed": seed}),
        "evaluate_every": evaluate_every,
        "on_divergence": on_divergence,
        **({"meta_batches": meta_batches} if learner.adapts else {}),
    }
    if checkpoint is not None and Path(checkpoint).exists():
        run.history = resume_checkpoint(checkpoint, described, learner, run.parts)
    for model in learner.models:
        model.train()
    if not run.history:
        run.evaluate(0)
    start = run.history[-1]["step"]
    policy = _Policy(run, on_divergence)
    bar = tqdm(range(start + 1, steps + 1), initial=start, total=steps, disable=not progress, leave=None, desc="fit")
    run.resume_clock()
    for step in bar:
        policy.take(step)
        if step % evaluate_every == 0 or step == steps:
            policy.before_evaluation(step)
            run.evaluate(step)
            shown = run.history[-1]
            bar.set_postfix(train_loss=f"{shown['train_loss']:.3g}", valid_error=f"{shown['valid_error']:.3g}")
            policy.after_evaluation()
            if checkpoint is not None:
                save_checkpoint(checkpoint, described, learner, run.parts, run.history)
    learner.write_back()
    history = pd.DataFrame(run.history)
    if not several:
        return history
    history["member"] = [i % len(seeds) for i in range(len(history))]  # two may have one seed
    return history.sort_values(["seed", "member", "step"], kind="stable", ignore_index=True).drop(columns="member")


class _Run:
    """A run under way: what trains, on which batches, and what was seen of it."""

    def __init__(
        self,
        learner: Learner,
        datasets: Sequence[Dataset],
        streams: Streams,
        *,
        scheduler: LRScheduler | None,
        seeds: list[int] | None,
        callback: Callback | None,
    ):
        self.learner, self.streams, self.scheduler = learner, streams, scheduler
        self.seeds, self.callback, self.kind = seeds, callback, datasets[0].kind
        device = next(learner.models[0].parameters()).device
        self.held_out = {name: [getattr(data, name).to(device) for data in datasets] for name in ("valid", "test")}
        self.history: list[dict] = []
        self.training_losses: list[Tensor] = []
        self.meta_losses: list[Tensor] = []
        self.seconds, self.clock = 0.0, 0.0

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the learner."""
        scheduler = {"scheduler": self.scheduler} if self.scheduler else {}
        return {**self.streams.parts(numbered=self.seeds is not None), **scheduler}

    def resume_clock(self) -> None:
        """Go on counting seconds where the history ends."""
        self.seconds, self.clock = self.history[-1]["seconds"], time.perf_counter()

    def step(self) -> None:
        """One step of the learner, and of the scheduler."""
        batch, meta_batch = self.streams.draw(self.learner.adapts)
        result = self.learner.step(batch, meta_batch)
        self.training_losses.append(result.training_loss)
        if result.meta_loss is not None:
            self.meta_losses.append(result.meta_loss)
        if self.scheduler:
            self.scheduler.step()

    def evaluate(self, step: int) -> None:
        """Add a row to the history for each model; the clock stands still meanwhile."""
        if step:
            self.seconds += time.perf_counter() - self.clock
        means = [self._means(losses) for losses in (self.training_losses, self.meta_losses)]
        self.training_losses, self.meta_losses = [], []
        self.learner.write_back()
        rates = self.learner.learning_rates()
        for i, model in enumerate(self.learner.models):
            row: dict[str, Any] = {} if self.seeds is None else {"seed": self.seeds[i]}
            row |= {"step": step, "train_loss": means[0][i], "meta_loss": means[1][i]}
            for name, splits in self.held_out.items():
                row[f"{name}_error"], row[f"{name}_loss"] = evaluate(model, splits[i], self.kind)
            self.history.append({**row, "learning_rate": rates[i], "seconds": self.seconds})
            if self.callback:
                with kept_modes(model):
                    self.callback(step, model, self.learner.losses[i])
        self.clock = time.perf_counter()

    def _means(self, losses: Sequence[Tensor]) -> list[float]:
        """The mean loss of each model; NaN of none."""
        if not losses:
            return [math.nan] * len(self.learner.models)
        return torch.stack(list(losses)).mean(0).reshape(-1).tolist()


class _Policy:
    """What is done about steps that are not finite: see ``on_divergence`` of :func:`fit`."""

    def __init__(self, run: _Run, policy: str):
        self.run, self.policy = run, policy
        self.undone = 0
        self.good = self._states() if policy == "restore" else {}

    def take(self, step: int) -> None:
        """Take a step, or undo it."""
        run = self.run
        if self.policy == "skip":
            self.good = self._states()
        counts = len(run.training_losses), len(run.meta_losses)
        try:
            run.step()
            if self.policy != "raise":
                self._check(run.training_losses[-1])
        except FloatingPointError as error:
            if self.policy == "raise" or self.undone == MAX_UNDONE:
                raise FloatingPointError(f"step {step}: {error}") from error
            warnings.warn(f"step {step}: {error}; {self.policy} and go on", RuntimeWarning, stacklevel=3)
            del run.training_losses[counts[0] :], run.meta_losses[counts[1] :]
            states = copy.deepcopy(self.good)
            run.learner.load_state_dict(states["learner"])
            if run.scheduler:
                run.scheduler.load_state_dict(states["scheduler"])
            self.undone += 1

    def before_evaluation(self, step: int) -> None:
        """Where nothing was checked step by step, check all steps since the last evaluation at once."""
        losses = self.run.training_losses
        if self.policy != "raise":
            return
        finite = torch.isfinite(torch.stack(losses)).reshape(len(losses), -1).all(1).tolist()
        first = finite.index(False) if False in finite else len(finite) - 1
        try:
            self._check(losses[first])
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step - len(finite) + 1 + first}: {error}") from None

    def after_evaluation(self) -> None:
        """Begin to count anew; what is reached may be gone back to."""
        self.undone = 0
        if self.policy == "restore":
            self.good = self._states()

    def _check(self, loss: Tensor) -> None:
        """Raise ``FloatingPointError`` unless the loss of a step, its gradient and its result are finite."""
        watched, model = self.run.learner.watched(), self.run.learner.models[0]
        check_finite({"loss": loss, **watched}, model if len(self.run.learner.models) == 1 else None)

    def _states(self) -> dict[str, Any]:
        scheduler = {"scheduler": self.run.scheduler.state_dict()} if self.run.scheduler else {}
        return copy.deepcopy({"learner": self.run.learner.state_dict(), **scheduler})


def _one_each(
    learner: Learner, data: Dataset | Sequence[Dataset], seed: int | Sequence[int]
) -> tuple[list[Dataset], list[int]]:
    """A data set and a seed for each model."""
    if not isinstance(learner, Learner):
        raise TypeError(
            f"fit trains a learner, got {type(learner).__name__}; give Plain(model, loss, optimizer), or"
            " OnlineLoss(model, loss_network, optimizer)"
        )
    count = len(learner.models)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    if wrong := [one for one in seeds if not is_whole(one)]:
        raise TypeError(f"seed must be a whole number, S of them for a stack, got {wrong[0]!r}; give an int, such as 0")
    datasets = [data] * count if isinstance(data, Dataset) else data
    if not isinstance(datasets, list | tuple) or any(not isinstance(one, Dataset) for one in datasets) or not datasets:
        raise TypeError(f"data must be a Dataset, got {type(data).__name__}; load_dataset and Dataset(...) give one")
    if len(seeds) != count or len(datasets) != count:
        raise ValueError(
            f"give as many of each, at least one: got {count} models, {len(datasets)} data sets, {len(seeds)} seeds"
        )
    sizes = {(d.kind, len(d.train), len(d.valid), d.input_shape, d.outputs) for d in datasets}
    if len(sizes) != 1:
        raise ValueError(f"the data sets differ in kind or size: {sizes}")
    return list(datasets), seeds


def _check_policies(
    learner: Learner,
    datasets: Sequence[Dataset],
    meta_batches: str,
    scheduler: LRScheduler | None,
    augment: Callable[[Tensor], Tensor] | None,
    on_divergence: str,
) -> None:
    """Raise, with the reason, for arguments that do not fit together."""
    if on_divergence not in POLICIES:
        raise ValueError(f"on_divergence must be one of {', '.join(POLICIES)}; got {on_divergence!r}")
    if meta_batches not in META_BATCHES:
        raise ValueError(f"meta_batches must be 'valid', 'train' or 'next', got {meta_batches!r}")
    if isinstance(learner, OnlineLoss) and learner.engine == "shared" and meta_batches != "next":
        raise ValueError(f"engine='shared' needs meta_batches='next', got {meta_batches!r}")
    if not learner.adapts:
        check_used("where nothing is learned beside the model", meta_batches=(meta_batches, "valid"))
    if learner.describe().get("learn") == "learning_rate" and scheduler is not None:
        raise ValueError("a learned learning rate and a scheduler exclude each other; leave one out")
    if augment is not None and len(learner.models) > 1:
        raise ValueError("augmentation draws other numbers in a stack than alone; train such models one by one")
    _check_scheduler(scheduler, learner.optimizer)
    for loss in learner.losses:
        if (kind := getattr(loss, "kind", datasets[0].kind)) != datasets[0].kind:
            raise ValueError(f"the loss is for {kind}, the data set {datasets[0].name!r} for {datasets[0].kind}")


def _check_scheduler(scheduler: LRScheduler | None, optimizer: Optimizer) -> None:
    if not isinstance(scheduler, LRScheduler | None):
        raise TypeError(f"scheduler must be one of torch's, such as MultiStepLR, got {type(scheduler).__name__}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau needs a metric at every step, which fit does not give; use a schedule of the step alone,"
            " such as MultiStepLR"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("the scheduler is of another optimizer; build it from the one that is given to fit")
