"""All seeds at once: S initialisations as one program over stacked tensors.

A small model leaves a processor idle, so ten seeds in one program cost about as much as three one after another
(``benchmarks/seeds.py``). The seeds never meet: each ends where it would alone, to rounding. How tensors are stacked is
told in :mod:`adalfl_lite.engines.stacked`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from adalfl_lite.checks import check_counts, check_factories, check_initialised, check_used
from adalfl_lite.engines.stacked import (
    Stack,
    StackedForward,
    StackedLoss,
    check_elementwise,
    check_stackable,
    keep_freed_memory,
    meta_step,
    task_losses,
)
from adalfl_lite.engines.steps import Batch
from adalfl_lite.learn.initialisation import (
    ABANDON_FACTOR,
    IMITATION_LEARNING_RATE,
    VALIDATION_BATCHES,
    Initialisation,
    MakeModel,
    MakeOptimizer,
    Validate,
    draw_outputs,
    pairs,
    rehearsal_moments,
    validator,
)
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import task_error, task_loss


def initialise_seeds(
    make_loss_network: Callable[[], LossNetwork],
    make_model: MakeModel,
    train: Sequence[Iterable[Batch]],
    valid: Sequence[Iterable[Batch]],
    *,
    make_optimizer: MakeOptimizer,
    seeds: Sequence[int],
    steps: int = 2500,
    meta_learning_rate: float = 1e-3,
    imitation_steps: int = 800,
    rollout_steps: int = 20,
    rehearsals: int = 8,
    rehearsal_steps: int = 300,
    validate: Sequence[Validate] | None = None,
    progress: bool = False,
) -> tuple[list[LossNetwork], list[Initialisation]]:
    """Algorithm 1 for S seeds, all in step: on the CPU, for each seed what these three lines do ::

        torch.manual_seed(seed)
        loss_network = make_loss_network()
        initialise(loss_network, make_model, train, valid, ...)

    Args:
        make_loss_network, make_model: draw from torch's global random state, of which every seed has its own.
        train, valid: S streams each, of batches of one size.
        make_optimizer: parameters -> the base optimizer: SGD, Adam or AdamW.
        seeds: S seeds of what is drawn at random: loss networks, models, and the outputs of the imitation.
        steps, meta_learning_rate, imitation_steps, rollout_steps, rehearsals, rehearsal_steps, progress: as in
            :func:`~adalfl_lite.learn.initialisation.initialise`.
        validate: S functions model -> (error, task loss), to score the rehearsals.

    Returns:
        The S loss networks, and what was done to each.

    Raises:
        ValueError, TypeError: the parts do not fit together, or cannot be stacked, with the reason.
        FloatingPointError: every rehearsal of a seed diverged, or one rollout did where the base optimizer counts steps
            (Adam), so that a single seed cannot start over; use ``initialise``.
    """
    check_counts(
        steps=steps,
        imitation_steps=(imitation_steps, 0),
        rollout_steps=rollout_steps,
        rehearsals=(rehearsals, 0),
        rehearsal_steps=rehearsal_steps,
    )
    check_factories(make_loss_network=make_loss_network, make_model=make_model, make_optimizer=make_optimizer)
    if not rehearsals:
        check_used("without rehearsals", validate=(validate, None))
    counts = {"seeds": len(seeds), "train": len(train), "valid": len(valid)}
    counts |= {} if validate is None else {"validate": len(validate)}
    if not len(seeds) or len(set(counts.values())) != 1:
        raise ValueError(f"give as many of each, at least one: got {', '.join(f'{n} {k}' for k, n in counts.items())}")
    keep_freed_memory()
    runs = [_Run(seed, rollout_steps) for seed in seeds]
    networks = [run.draw(make_loss_network) for run in runs]
    kind = networks[0].kind
    train_batches, meta_batches = [pairs(b, "train") for b in train], [pairs(b, "valid") for b in valid]
    if validate is None:
        held = [list(itertools.islice(b, VALIDATION_BATCHES if rehearsals else 0)) for b in meta_batches]
        validate = [validator(batches, task_loss(kind), task_error(kind)) for batches in held]

    def begin() -> tuple[Stack, Optimizer]:
        models = [run.draw(make_model).train() for run in runs]
        if len({id(model) for model in models}) < len(models):
            raise ValueError("make_model returned the same model again; it must build a fresh one at every call")
        for model in models:
            check_initialised(model)
        check_stackable(models, networks)
        stack = Stack(models)
        optimizer = make_optimizer(stack.parameters)
        check_elementwise(optimizer)
        return stack, optimizer

    def rehearse(step: int) -> None:
        stack, optimizer = begin()
        for _ in range(rehearsal_steps):
            StackedForward(stack, loss, optimizer, kind)(_stacked([next(b) for b in train_batches]))
        stack.write_back()
        for i, (run, model) in enumerate(zip(runs, stack.models, strict=True)):
            run.record(step, validate[i](model), [p[i] for p in loss.parameters])

    if imitation_steps:
        prediction = [run.draw(make_model) for run in runs][0](_stacked([next(b) for b in train_batches])[0][0])
    loss = StackedLoss(networks)
    if imitation_steps:
        _imitate(loss, kind, runs, prediction, imitation_steps)
    if imitation_steps and rehearsals:
        rehearse(0)
    meta_optimizer = torch.optim.Adam(loss.parameters, lr=meta_learning_rate)
    moments = set(rehearsal_moments(steps, rehearsals))
    stack, optimizer = begin()
    for step in tqdm(range(1, steps + 1), disable=not progress, leave=None, desc=f"initialise {len(seeds)} seeds"):
        if all(run.remaining == 0 for run in runs):
            stack, optimizer = begin()
        else:
            for i, run in enumerate(runs):
                if run.remaining == 0:
                    stack.replace(i, run.draw(make_model).train())
                    _forget(optimizer, i, run.seed, step)
        batch, meta_batch = (_stacked([next(b) for b in batches]) for batches in (train_batches, meta_batches))
        result = StackedForward(stack, loss, optimizer, kind)(batch, meta_batch)
        meta_step(meta_optimizer, result)
        reached = torch.as_tensor(result.meta_loss)
        current = torch.where(result.finite(), reached, math.inf)
        for run, value in zip(runs, current.tolist(), strict=True):
            run.advance(value)
        if step in moments:
            rehearse(step)
    outcomes = []
    for i, run in enumerate(runs):
        outcomes.append(run.outcome(steps))
        for parameter, best in zip(loss.parameters, run.best_state or [], strict=False):
            parameter[i] = best
    loss.write_back()
    return networks, outcomes


class _Run:
    """What Algorithm 1 keeps of one seed: its random state, its rollout, its rehearsals."""

    def __init__(self, seed: int, rollout_steps: int):
        self.seed, self.rollout_steps = seed, rollout_steps
        self.random_state = torch.Generator().manual_seed(seed).get_state()
        self.remaining, self.first_loss, self.abandoned = rollout_steps, math.inf, 0
        self.records: list[dict] = []
        self.best_key, self.best_step = (math.inf, math.inf), 0
        self.best_state: list[Tensor] | None = None

    def draw(self, make: Callable, *arguments: object) -> Any:
        """What ``make`` makes from this seed's own random state."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            return make(*arguments)
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(outside)

    def advance(self, task_loss: float) -> None:
        """Count a step, which ends the rollout if the task loss exploded."""
        if self.remaining == 0:
            self.remaining, self.first_loss = self.rollout_steps, math.inf
        self.remaining -= 1
        if self.first_loss == math.inf:
            self.first_loss = task_loss
        if not task_loss < ABANDON_FACTOR * self.first_loss:
            self.abandoned, self.remaining = self.abandoned + 1, 0

    def record(self, step: int, score: tuple[float, float], phi: list[Tensor]) -> None:
        """Keep φ if its rehearsal is the best so far."""
        error, value = score if all(map(math.isfinite, score)) else (math.inf, math.inf)
        self.records.append({"step": step, "error": error, "task_loss": value})
        if (error, value) < self.best_key:
            self.best_key, self.best_step = (error, value), step
            self.best_state = [tensor.clone() for tensor in phi]

    def outcome(self, steps: int) -> Initialisation:
        """What was done; ``FloatingPointError`` if every rehearsal diverged."""
        if self.records and self.best_state is None:
            raise FloatingPointError(
                f"all {len(self.records)} rehearsals of seed {self.seed} diverged; lower the base learning rate, or"
                " rehearse more often"
            )
        rehearsals = pd.DataFrame(self.records, columns=["step", "error", "task_loss"])
        return Initialisation(steps, self.best_step if self.best_state else steps, self.abandoned, rehearsals)


def _imitate(loss: StackedLoss, kind: str, runs: Sequence[_Run], prediction: Tensor, steps: int) -> None:
    """Fit every φ to the task loss, as :func:`~adalfl_lite.learn.initialisation.imitate` does for one.

    With g = ∂L_T/∂f the gradient of ‖∂M_φ/∂f − g‖² is the derivative of ∂M_φ/∂f in φ, along 2 (∂M_φ/∂f − g).
    """
    optimizer = torch.optim.Adam(loss.parameters, lr=IMITATION_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        output, target = _stacked([run.draw(draw_outputs, kind, prediction) for run in runs])
        output.requires_grad_(True)
        (wanted,) = torch.autograd.grad(task_losses(kind, output, target).sum(), output)
        _, given, along = loss.derivatives(output.detach(), target)
        scale = wanted.square().flatten(1).sum(1)[:, None, None]
        for parameter, gradient in zip(loss.parameters, along(2 * (given - wanted) / scale), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()


def _forget(optimizer: Optimizer, i: int, seed: int, step: int) -> None:
    """Let the optimizer of a stack forget the i-th seed, whose rollout starts over before those of the others."""
    if type(optimizer) is not torch.optim.SGD or any(group["dampening"] for group in optimizer.param_groups):
        raise FloatingPointError(
            f"the rollout of seed {seed} diverged before step {step}, and {type(optimizer).__name__} cannot start over"
            " for one seed of a stack; lower the learning rate, or use initialise"
        )
    for state in optimizer.state.values():
        if (buffer := state.get("momentum_buffer")) is not None:
            buffer[i] = 0


def _stacked(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.stack(inputs), torch.stack(targets)
