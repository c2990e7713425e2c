"""The loop of Algorithms 1 and 3, written once: rollouts and rehearsals of what is learned, one thing or S in step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from adalfl_lite.checks import check_counts, check_pair
from adalfl_lite.engines import ENGINES
from adalfl_lite.engines.steps import NO_CLIPPING, Batch, plain_step
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.losses.task import Loss
from adalfl_lite.passes import eval_mode

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Validate = Callable[[nn.Module], tuple[float, float]]

ABANDON_FACTOR = 100.0
"""A rollout ends early when its task loss exceeds this many times that of its first step."""

VALIDATION_BATCHES = 20
"""A rehearsal is scored on at most this many meta batches, drawn once, unless ``validate`` is given."""


INITIAL_META_LEARNING_RATE = {"loss": 1e-3, "learning rate": 1e-2}
"""η of Algorithms 1 and 3 by what is learned, where the settings have none."""


@dataclass(frozen=True)
class Initialiser:
    """How Algorithm 1 is run, or Algorithm 3; what is not said is our recommendation.

    Raises:
        ValueError: a setting out of range, or unknown.
    """

    steps: int = 2500
    """S_init, the number of meta steps."""
    meta_learning_rate: float | None = None
    """η of the Adam that updates what is learned; None: :data:`INITIAL_META_LEARNING_RATE` of it."""
    imitation_steps: int = 800
    """Steps of :func:`~adalfl_lite.learn.imitation.imitate` before the first meta step; 0 starts from φ as it is."""
    rollout_steps: int = 20
    """Base steps before model and optimizer are drawn afresh."""
    rehearsals: int = 8
    """How many φ along the way are tried out; 0 keeps the last one."""
    rehearsal_steps: int = 300
    """Length of a rehearsal; best as long as the training to come, where that can be afforded."""
    clip_gradient_norm: float | None = None
    """Of the base steps, as in the training to come; see :class:`~adalfl_lite.learn.OnlineLoss`."""
    clip_gradient_value: float | None = None
    """The other way of clipping; one of the two at most."""
    engine: str = "forward"
    """Of the meta-gradient, a name in :data:`~adalfl_lite.engines.ENGINES`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        check_counts(
            steps=self.steps,
            imitation_steps=(self.imitation_steps, 0),
            rollout_steps=self.rollout_steps,
            rehearsals=(self.rehearsals, 0),
            rehearsal_steps=self.rehearsal_steps,
        )
        if self.meta_learning_rate is not None and not 0 <= self.meta_learning_rate < math.inf:
            raise ValueError(f"meta_learning_rate must be 0 or more and finite, got {self.meta_learning_rate}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}")
        Clipping(self.clip_gradient_norm, self.clip_gradient_value)  # checks its bounds

    @classmethod
    def published(cls, **changes: Any) -> Self:
        """The paper's algorithm: one base step from a random φ, and the last φ is kept; with some settings changed."""
        return replace(cls(imitation_steps=0, rollout_steps=1, rehearsals=0), **changes)

    def with_(self, **changes: Any) -> Self:
        """The same with some settings changed."""
        return replace(self, **changes)

    @property
    def clipping(self) -> Clipping:
        """Of the base steps' gradient."""
        return Clipping(self.clip_gradient_norm, self.clip_gradient_value)

    def rate_for(self, learned: str) -> float:
        """η, where what is learned is a "loss" or a "learning rate"."""
        return INITIAL_META_LEARNING_RATE[learned] if self.meta_learning_rate is None else self.meta_learning_rate

    @property
    def not_for_a_stack(self) -> str:
        """The first setting that several loss networks as one program cannot have, in words; "" if there is none."""
        given: dict[str, Any] = {
            "clip_gradient_norm": self.clip_gradient_norm,
            "clip_gradient_value": self.clip_gradient_value,
            "engine": None if self.engine == "forward" else self.engine,
        }
        return next((f"{name}={value!r}" for name, value in given.items() if value is not None), "")

    @property
    def moments(self) -> list[int]:
        """The steps after which there is a rehearsal: growing by √2, the last one at the end."""
        moments = {round(self.steps * 2 ** (-k / 2)) for k in range(self.rehearsals)}
        return sorted(step for step in moments if step >= 1)


@dataclass(frozen=True)
class Initialisation:
    """What was done; the loss network, or the learning rate, itself was changed in place."""

    steps: int
    """Meta steps taken."""
    chosen_step: int
    """The step whose φ was kept."""
    abandoned_rollouts: int
    """Rollouts that diverged and were drawn afresh."""
    rehearsals: pd.DataFrame
    """One row per rehearsal: step, error and task_loss on validation data (infinite where it diverged)."""


class Member:
    """What the loop keeps of one thing that is learned: its random state, its rollout, its rehearsals.

    Args:
        rollout_steps: of the settings.
        seed: of a random state of its own, from which :meth:`draw` draws; None where nothing is drawn through it.
    """

    def __init__(self, rollout_steps: int, seed: int | None = None):
        self.seed, self.rollout_steps = seed, rollout_steps
        self.random_state = torch.Generator().manual_seed(seed or 0).get_state()
        self.remaining, self.first_loss, self.abandoned = rollout_steps, math.inf, 0
        self.records: list[dict[str, float]] = []
        self.best_key, self.best_step = (math.inf, math.inf), 0
        self.best: Any = None

    def draw(self, make: Callable, *arguments: object) -> Any:
        """What ``make`` makes from this member's random state."""
        # each member draws as it would alone, whatever the others have drawn before
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
        # the measure of an explosion is this rollout's own beginning
        if self.first_loss == math.inf:
            self.first_loss = task_loss
        if not task_loss < ABANDON_FACTOR * self.first_loss:  # NaN too
            self.abandoned, self.remaining = self.abandoned + 1, 0

    def record(self, step: int, score: tuple[float, float], state: Any) -> None:
        """Keep what was rehearsed if it is the best so far."""
        error, value = score if all(map(math.isfinite, score)) else (math.inf, math.inf)
        self.records.append({"step": step, "error": error, "task_loss": value})
        # validation error first; the task loss decides between equal errors
        if (error, value) < self.best_key:
            self.best_key, self.best_step, self.best = (error, value), step, state

    def outcome(self, steps: int) -> Initialisation:
        """What was done; ``FloatingPointError`` if every rehearsal diverged."""
        if self.records and self.best is None:
            of = "" if self.seed is None else f" of seed {self.seed}"
            raise FloatingPointError(
                f"all {len(self.records)} rehearsals{of} diverged; lower the base learning rate, or rehearse more often"
            )
        rehearsals = pd.DataFrame(self.records, columns=["step", "error", "task_loss"])
        return Initialisation(steps, self.best_step if self.records else steps, self.abandoned, rehearsals)


class Subject(Protocol):
    """What is learned, one or S in step, with the base models it is learned on."""

    @property
    def members(self) -> Sequence[Member]:
        """One for each thing that is learned."""

    def begin(self) -> None:
        """Draw a fresh base model and optimizer for every member."""

    def restart(self, i: int, step: int) -> None:
        """Draw them for one member alone, before this step."""

    def step(self) -> Sequence[float]:
        """A meta step of all; the task loss that each led to, infinite where it is not finite."""

    def rehearse(self) -> Sequence[tuple[float, float]]:
        """(error, task loss) on validation data of a training with each as it is."""

    def state(self, i: int) -> Any:
        """A copy of what member i has learned."""

    def restore(self, i: int, state: Any) -> None:
        """Let a member have again what :meth:`state` copied."""


def meta_learn(
    subject: Subject,
    settings: Initialiser,
    *,
    rehearse_first: bool,
    callback: Callable[[int], None] | None = None,
    progress: bool = False,
) -> list[Initialisation]:
    """Run the meta steps, rehearse along the way, and put back the best that was rehearsed.

    Args:
        subject: what is learned; each member ends as the best of it that was rehearsed.
        settings: steps, rollout_steps and rehearsals of them.
        rehearse_first: rehearse before the first meta step too.
        callback: called with the number of meta steps taken, 0 included.
        progress: show a progress bar.

    Raises:
        FloatingPointError: every rehearsal of a member diverged.
    """
    members, moments = subject.members, set(settings.moments)

    def rehearse(step: int) -> None:
        for i, (member, score) in enumerate(zip(members, subject.rehearse(), strict=True)):
            member.record(step, score, subject.state(i))

    if rehearse_first and settings.rehearsals:
        rehearse(0)
    if callback:
        callback(0)
    # the first rollout
    subject.begin()
    for step in tqdm(range(1, settings.steps + 1), desc="initialise", disable=not progress, leave=None):
        over = [i for i, member in enumerate(members) if member.remaining == 0]
        # all over at once is the rule: a rollout has the same length for all
        if len(over) == len(members):
            subject.begin()
        else:  # the rollouts of some have diverged before their time
            for i in over:
                subject.restart(i, step)
        for member, task_loss in zip(members, subject.step(), strict=True):
            member.advance(task_loss)
        if step in moments:
            rehearse(step)
        if callback:
            callback(step)
    # refuse before anything is put back
    outcomes = [member.outcome(settings.steps) for member in members]
    for i, member in enumerate(members):
        if member.best is not None:
            subject.restore(i, member.best)
    return outcomes


def endless(batches: Iterable[Batch], name: str = "training") -> Iterator[Batch]:
    """Repeat a loader for ever, so that no epoch's end cuts a loop short; ``ValueError`` naming it if it is empty."""
    while True:
        # an iterator that is used up gives nothing the second time round
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
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be batches (inputs, targets), got {type(batches).__name__}; give a DataLoader, or"
            " of a Dataset data.train.batches(20, seed=0)"
        )
    for batch in endless(batches, name):
        check_pair(batch, f"a {name} batch", remedy)
        if any(isinstance(part, tuple | list) for part in batch):
            raise TypeError(
                f"a {name} batch is a list of micro batches, which are for step() alone; use smaller batches"
            )
        yield batch


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
    score = validate(model)
    if not isinstance(score, Sequence) or len(score) != 2:
        raise TypeError(f"validate must return (error, task loss), got {score!r}; give two floats")
    error, value = map(float, score)
    return (error, value) if math.isfinite(error) and math.isfinite(value) else (math.inf, math.inf)


def validations(
    meta_batches: Iterator[Batch], settings: Initialiser, task_loss: Loss, task_error: Loss, validate: Validate | None
) -> Validate:
    """How rehearsals are scored: by ``validate``, or on the first meta batches, which are used up for it."""
    if validate is not None:
        return validate
    held = list(itertools.islice(meta_batches, VALIDATION_BATCHES if settings.rehearsals else 0))
    return validator(held, task_loss, task_error)


def validator(batches: list[Batch], task_loss: Loss, task_error: Loss) -> Validate:
    """A function of a model: its mean (error, task loss) over ``batches``, in eval mode."""

    @torch.no_grad()
    def validate(model: nn.Module) -> tuple[float, float]:
        with eval_mode(model):
            pairs = [(model(inputs), targets) for inputs, targets in batches]
        means = [sum(measure(*pair).item() for pair in pairs) / len(pairs) for measure in (task_error, task_loss)]
        return means[0], means[1]

    return validate
