"""Algorithm 1: offline initialisation of the loss network, as in ML³ (paper, section on offline initialisation).

Repeat: draw a fresh base model, take a base step with M_φ on a training batch, update φ with the gradient of the task
loss on a meta batch at the new θ. Its reward is one step deep, so it favours steep losses: left to run, the slope of
M_φ grows without bound, and a loss that is best for one step ruins a whole training run (the short-horizon bias). Where
the base model learns slowly, its outputs never leave the neighbourhood of the uniform distribution, and what M_φ does
elsewhere is left to chance. Three additions of ours, each with a setting that gives the paper's algorithm back:

- ``imitation_steps``: before anything else φ is fitted to the task loss, so that M_φ is sensible for every output, also
  those that Algorithm 1 does not visit (0 is Algorithm 1, which begins with a random φ);
- ``rollout_steps``: the base model and its optimizer are drawn afresh every so many steps instead of every step, so φ
  meets momentum and later stages of training (1 is Algorithm 1);
- ``rehearsals``: at that many geometrically spaced moments φ is frozen and a fresh model trained with it for
  ``rehearsal_steps``; the φ whose model has the lowest validation error is kept (0 rehearsals is Algorithm 1). The
  imitation is rehearsed first, so the loss that is kept beats it on validation data, or is it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from adalfl_lite.checks import check_counts, check_factories, check_pair, check_used
from adalfl_lite.engines import ENGINES
from adalfl_lite.engines.steps import NO_CLIPPING, Batch, plain_step
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.learn.online import OnlineLoss, default_task_loss
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import Loss, task_error
from adalfl_lite.passes import eval_mode

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Validate = Callable[[nn.Module], tuple[float, float]]

ABANDON_FACTOR = 100.0
"""A rollout ends early when its task loss exceeds this many times that of its first step."""

OUTPUT_SCALE = {"classification": 6.0, "regression": 3.0}
"""The outputs of :func:`draw_outputs` have standard deviations up to this: logits, or standardised predictions."""

IMITATION_LEARNING_RATE = 0.02
"""Of the Adam of :func:`imitate`."""

VALIDATION_BATCHES = 20
"""A rehearsal is scored on at most this many meta batches, drawn once, unless ``validate`` is given."""


class Learner(Protocol):
    """Trains a model and updates what it learns with, such as :class:`~adalfl_lite.learn.online.OnlineLoss`."""

    def step(self, batch: Batch, meta_batch: Batch) -> Any:
        """One step of both; the result has the ``task_loss`` on the meta batch."""


@dataclass(frozen=True)
class Initialisation:
    """What :func:`initialise` did; the loss network itself was changed in place."""

    steps: int
    """Meta steps taken."""
    chosen_step: int
    """The step whose φ was kept."""
    abandoned_rollouts: int
    """Rollouts that diverged and were drawn afresh."""
    rehearsals: pd.DataFrame
    """One row per rehearsal: step, error and task_loss on validation data (infinite where it diverged)."""


def initialise(
    loss_network: LossNetwork,
    make_model: MakeModel,
    train: Iterable[Batch],
    valid: Iterable[Batch],
    *,
    make_optimizer: MakeOptimizer,
    steps: int = 2500,
    meta_learning_rate: float = 1e-3,
    imitation_steps: int = 800,
    rollout_steps: int = 20,
    rehearsals: int = 8,
    rehearsal_steps: int = 300,
    validate: Validate | None = None,
    task_loss: Loss | None = None,
    clip_gradient_norm: float | None = None,
    clip_gradient_value: float | None = None,
    engine: str = "forward",
    progress: bool = False,
) -> Initialisation:
    """Meta-learn ``loss_network`` in place before training (Algorithm 1, with the three additions above).

    Args:
        loss_network: M_φ.
        make_model: draws a fresh base model (from torch's global random state), in train mode, on its device.
        train: batches (inputs, targets) for the base steps; a loader is repeated when it ends.
        valid: meta batches; give the training batches again to use no validation data.
        make_optimizer: parameters -> the base optimizer that will be used for training.
        steps: S_init, the number of meta steps.
        meta_learning_rate: η of the Adam that updates φ.
        imitation_steps: steps of :func:`imitate` before the first meta step; 0 starts from ``loss_network`` as it is.
        rollout_steps: base steps before model and optimizer are drawn afresh; 1 is the paper's algorithm.
        rehearsals: how many φ along the way are tried out; 0 keeps the last one, as the paper does.
        rehearsal_steps: length of a rehearsal; best as long as the training to come, where that can be afforded.
        validate: model -> (error, task loss) on validation data, to score a rehearsal; refused where there is none.
        task_loss: L_T; by default the one of ``loss_network.kind``.
        clip_gradient_norm, clip_gradient_value: of the base steps, as in the training to come.
        engine: meta-gradient engine, see :class:`~adalfl_lite.learn.online.OnlineLoss`.
        progress: show a progress bar.

    Raises:
        ValueError: a count is out of range, or a loader is empty.
        TypeError: a loader gives no pairs, or ``make_model`` or ``make_optimizer`` is no function.
        FloatingPointError: every rehearsal diverged; lower the base learning rate.
    """
    check_counts(
        steps=steps,
        imitation_steps=(imitation_steps, 0),
        rollout_steps=rollout_steps,
        rehearsals=(rehearsals, 0),
        rehearsal_steps=rehearsal_steps,
    )
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    check_factories(make_model=make_model, make_optimizer=make_optimizer)
    if not rehearsals:
        check_used("without rehearsals", validate=(validate, None))
    task_loss = task_loss or default_task_loss(loss_network)
    clipping = Clipping(clip_gradient_norm, clip_gradient_value)
    train_batches, meta_batches = pairs(train, "train"), pairs(valid, "valid")
    if validate is None:
        held = list(itertools.islice(meta_batches, VALIDATION_BATCHES if rehearsals else 0))
        validate = validator(held, task_loss, task_error(loss_network.kind))
    meta_optimizer = torch.optim.Adam(loss_network.parameters(), lr=meta_learning_rate)

    last: nn.Module | None = None

    def draw() -> OnlineLoss:
        nonlocal last
        model = make_model().train()
        if model is last:
            raise ValueError("make_model returned the same model again; it must build a fresh one at every call")
        last = model
        return OnlineLoss(
            model,
            loss_network,
            make_optimizer(model.parameters()),
            meta_optimizer=meta_optimizer,
            task_loss=task_loss,
            clip_gradient_norm=clip_gradient_norm,
            clip_gradient_value=clip_gradient_value,
            engine=engine,
        )

    def rehearse() -> tuple[float, float]:
        frozen = loss_network.clone().requires_grad_(False)
        return rehearsal(frozen, make_model, make_optimizer, train_batches, rehearsal_steps, validate, clipping)

    if imitation_steps:
        imitate(loss_network, task_loss, make_model().train()(next(train_batches)[0]), steps=imitation_steps)
    return meta_learn(
        loss_network,
        draw,
        rehearse,
        train_batches,
        meta_batches,
        steps=steps,
        rollout_steps=rollout_steps,
        rehearsals=rehearsals,
        rehearse_first=imitation_steps > 0,
        progress=progress,
    )


def meta_learn(
    learned: nn.Module,
    draw: Callable[[], Learner],
    rehearse: Callable[[], tuple[float, float]],
    train_batches: Iterator[Batch],
    meta_batches: Iterator[Batch],
    *,
    steps: int,
    rollout_steps: int,
    rehearsals: int,
    rehearse_first: bool,
    progress: bool = False,
) -> Initialisation:
    """Rollouts and rehearsals of anything that is meta-learned, a loss or a learning rate.

    Args:
        learned: the module whose parameters the learners update; it ends as the best one that was rehearsed.
        draw: a fresh learner, with a fresh base model.
        rehearse: (error, task loss) on validation data of a training with ``learned`` as it is.
        train_batches, meta_batches: endless.
        steps, rollout_steps, rehearsals, progress: see :func:`initialise`.
        rehearse_first: rehearse before the first meta step too.

    Raises:
        FloatingPointError: every rehearsal diverged.
    """
    moments = set(rehearsal_moments(steps, rehearsals))
    records: list[dict] = []
    best_key, best_step, best_state = (math.inf, math.inf), steps, None
    abandoned = 0

    def record(step: int) -> None:
        nonlocal best_key, best_step, best_state
        error, loss = rehearse()
        records.append({"step": step, "error": error, "task_loss": loss})
        if (error, loss) < best_key:
            best_key, best_step = (error, loss), step
            best_state = {name: tensor.clone() for name, tensor in learned.state_dict().items()}

    if rehearse_first and rehearsals:
        record(0)
    learner, first_loss = draw(), math.inf
    remaining = rollout_steps
    for step in tqdm(range(1, steps + 1), desc="initialise", disable=not progress, leave=None):
        if remaining == 0:
            learner, remaining, first_loss = draw(), rollout_steps, math.inf
        remaining -= 1
        try:
            current = learner.step(next(train_batches), next(meta_batches)).meta_loss.item()
        except FloatingPointError:
            current = math.inf
        first_loss = min(first_loss, current) if first_loss == math.inf else first_loss
        if not current < ABANDON_FACTOR * first_loss:
            abandoned, remaining = abandoned + 1, 0
        if step in moments:
            record(step)
    if records and best_state is None:
        raise FloatingPointError(
            f"all {len(records)} rehearsals diverged; lower the base learning rate, or rehearse more often"
        )
    if best_state is not None:
        learned.load_state_dict(best_state)
    return Initialisation(steps, best_step, abandoned, pd.DataFrame(records, columns=["step", "error", "task_loss"]))


def imitate(
    loss_network: LossNetwork,
    task_loss: Loss,
    prediction: Tensor,
    *,
    steps: int = 800,
    learning_rate: float = IMITATION_LEARNING_RATE,
) -> float:
    """Fit φ so that M_φ pushes the outputs as the task loss does: min_φ E ‖∂M_φ/∂f − ∂L_T/∂f‖² / E ‖∂L_T/∂f‖².

    The outputs are drawn at random, from hesitant to certain, so this needs neither data nor a model.

    Args:
        loss_network: M_φ, changed in place.
        task_loss: L_T.
        prediction: an output of the base model, (B, C) or (B, K); only its shape, dtype and device are used.
        steps: steps of Adam.
        learning_rate: of Adam, annealed to zero along a cosine.

    Returns:
        The relative squared error at the last step.
    """
    optimizer = torch.optim.Adam(loss_network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    error = torch.tensor(math.inf)
    for _ in range(steps):
        output, target = draw_outputs(loss_network.kind, prediction)
        output.requires_grad_(True)
        (wanted,) = torch.autograd.grad(task_loss(output, target), output)
        (given,) = torch.autograd.grad(loss_network(output, target), output, create_graph=True)
        error = (given - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return error.item()


def draw_outputs(kind: str, prediction: Tensor) -> Batch:
    """Random outputs, from hesitant to certain, of the shape, dtype and device of ``prediction``; and their targets."""
    like: dict[str, Any] = {"dtype": prediction.dtype, "device": prediction.device}
    output = OUTPUT_SCALE[kind] * torch.rand(len(prediction), 1, **like) * torch.randn(prediction.shape, **like)
    if kind == "classification":
        return output, torch.randint(prediction.shape[1], (len(prediction),), device=prediction.device)
    return output, torch.randn(prediction.shape, **like)


def endless(batches: Iterable[Batch], name: str = "training") -> Iterator[Batch]:
    """Repeat a loader for ever, so that no epoch's end cuts a loop short; ``ValueError`` naming it if it is empty."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"the {name} batches are empty or used up; pass a loader that can be iterated again")


def pairs(batches: Iterable[Batch], name: str) -> Iterator[Batch]:
    """:func:`endless`, of (inputs, targets) alone; ``TypeError`` with a remedy at anything else."""
    remedy = (
        "; the batches must be a loader of pairs, and of two tensors"
        " DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True) makes one"
    )
    for batch in endless(batches, name):
        check_pair(batch, f"a {name} batch", remedy)
        if any(isinstance(part, tuple | list) for part in batch):
            raise TypeError(
                f"a {name} batch is a list of micro batches, which are for step() alone; use smaller batches"
            )
        yield batch


def rehearsal_moments(last: int, count: int) -> list[int]:
    """``count`` steps growing by √2, ending at ``last``; duplicates and zeros are dropped."""
    return sorted({step for k in range(count) if (step := round(last * 2 ** (-k / 2))) >= 1})


def rehearsal(
    loss: Loss,
    make_model: MakeModel,
    make_optimizer: MakeOptimizer,
    batches: Iterator[Batch],
    steps: int,
    validate: Validate,
    clipping: Clipping = NO_CLIPPING,
) -> tuple[float, float]:
    """(error, task loss) on validation data of a fresh model trained with a fixed loss; infinite if it diverged."""
    model = make_model().train()
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        plain_step(model, loss, optimizer, next(batches), clipping=clipping)
    error, value = validate(model)
    return (error, value) if math.isfinite(error) and math.isfinite(value) else (math.inf, math.inf)


def validator(batches: list[Batch], task_loss: Loss, task_error: Loss) -> Validate:
    """A function of a model: its mean (error, task loss) over ``batches``, in eval mode."""

    @torch.no_grad()
    def validate(model: nn.Module) -> tuple[float, float]:
        with eval_mode(model):
            pairs = [(model(inputs), targets) for inputs, targets in batches]
        means = [sum(measure(*pair).item() for pair in pairs) / len(pairs) for measure in (task_error, task_loss)]
        return means[0], means[1]

    return validate
