"""Algorithm 1: offline initialisation of the loss network, as in ML³ (paper, section on offline initialisation).

Repeat: draw a fresh base model, take a base step with M_φ on a training batch, update φ with the gradient of the task
loss on a meta batch at the new θ. Its reward is one step deep, so it favours steep losses: left to run, the slope of
M_φ grows without bound, and a loss that is best for one step ruins a whole training run (the short-horizon bias). Where
the base model learns slowly, its outputs never leave the neighbourhood of the uniform distribution, and what M_φ does
elsewhere is left to chance. Three additions of ours, each with a setting of :class:`~adalfl_lite.learn.Initialiser`
that gives the paper's algorithm back:

- ``imitation_steps``: before anything else φ is fitted to the task loss, so that M_φ is sensible for every output, also
  those that Algorithm 1 does not visit (0 is Algorithm 1, which begins with a random φ);
- ``rollout_steps``: the base model and its optimizer are drawn afresh every so many steps instead of every step, so φ
  meets momentum and later stages of training (1 is Algorithm 1);
- ``rehearsals``: at that many geometrically spaced moments φ is frozen and a fresh model trained with it for
  ``rehearsal_steps``; the φ whose model has the lowest validation error is kept (0 rehearsals is Algorithm 1). The
  imitation is rehearsed first, so the loss that is kept beats it on validation data, or is it.

Algorithm 3 is the same with a learning rate in the place of φ. The loop itself is
:func:`~adalfl_lite.learn.meta_learning.meta_learn`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalfl_lite.checks import check_factories, check_initialised, check_trainable, check_used
from adalfl_lite.engines.stacked import (
    Stack,
    StackedForward,
    StackedLoss,
    check_elementwise,
    check_stackable,
    keep_freed_memory,
    meta_step,
)
from adalfl_lite.engines.steps import Batch
from adalfl_lite.learn.base import check_has_parameters, check_no_closure
from adalfl_lite.learn.imitation import draw_outputs, imitate, imitate_stacked
from adalfl_lite.learn.learning_rate import LearningRate, OnlineLearningRate
from adalfl_lite.learn.meta_learning import (
    Initialisation,
    Initialiser,
    MakeModel,
    MakeOptimizer,
    Member,
    Validate,
    meta_learn,
    pairs,
    rehearsal,
    validations,
)
from adalfl_lite.learn.online import OnlineLoss, default_task_loss
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import Loss, task_error, task_loss
from adalfl_lite.passes import parameters_of, process_random_state, restore_process_random_state

DEFAULT = Initialiser()


def initialise(
    loss_network: nn.Module,
    make_model: MakeModel,
    train: Iterable[Batch],
    valid: Iterable[Batch],
    *,
    make_optimizer: MakeOptimizer,
    settings: Initialiser = DEFAULT,
    task_loss: Loss | None = None,
    validate: Validate | None = None,
    callback: Callable[[int, nn.Module], None] | None = None,
    progress: bool = False,
) -> Initialisation:
    """Meta-learn ``loss_network`` in place before training: Algorithm 1, with three additions that ``settings`` tell.

    Args:
        loss_network: M_φ, usually a :class:`~adalfl_lite.losses.LossNetwork`; another module with a ``kind`` where
            nothing is imitated.
        make_model: draws a fresh base model (from torch's global random state), in train mode, on its device. One more
            than is needed is drawn, to be looked at. Models may share weights only where these are frozen.
        train: batches (inputs, targets) for the base steps; a loader is repeated when it ends.
        valid: meta batches; give the training batches again to use no validation data.
        make_optimizer: parameters -> the base optimizer that will be used for training.
        settings: how long, and with which of the additions.
        task_loss: L_T; by default the one of ``loss_network.kind``.
        validate: model -> (error, task loss) on validation data, to score a rehearsal; refused where there is none.
        callback: called as (meta steps taken, loss_network), 0 included.
        progress: show a progress bar.

    Raises:
        ValueError: a loader is empty, or something above cannot work, with the reason; the loss network is then as it
            was.
        TypeError: a loader gives no pairs, or ``make_model`` or ``make_optimizer`` is no function.
        FloatingPointError: every rehearsal diverged; lower the base learning rate.
    """
    check_factories(make_model=make_model, make_optimizer=make_optimizer)
    _check_validate(settings, validate)
    measured = task_loss or default_task_loss(loss_network)
    fresh = _Fresh(make_model, make_optimizer)
    train_batches, meta_batches = pairs(train, "train"), pairs(valid, "valid")
    # before the first training batch is drawn: the same batches score every rehearsal
    score = validations(meta_batches, settings, measured, task_error(loss_network.kind), validate)  # type: ignore[arg-type]
    if settings.imitation_steps and not isinstance(loss_network, LossNetwork):
        name = type(loss_network).__name__
        raise TypeError(f"{name} cannot imitate the task loss; use settings=Initialiser(imitation_steps=0)")
    # one for all rollouts: its moments outlive the models
    meta_optimizer = torch.optim.Adam(loss_network.parameters(), lr=settings.rate_for("loss"))

    def draw() -> OnlineLoss:
        model = fresh().train()
        return OnlineLoss(
            model,
            loss_network,
            make_optimizer(model.parameters()),
            meta_optimizer=meta_optimizer,
            task_loss=measured,
            clip_gradient_norm=settings.clip_gradient_norm,
            clip_gradient_value=settings.clip_gradient_value,
            engine=settings.engine,
        )

    def rehearse() -> tuple[float, float]:
        frozen: Any = _frozen(loss_network)
        steps, clipping = settings.rehearsal_steps, settings.clipping
        return rehearsal(frozen, fresh, make_optimizer, train_batches, steps, score, clipping)

    subject = _One(Member(settings.rollout_steps), loss_network, draw, rehearse, train_batches, meta_batches)
    look = None if callback is None else (lambda step: callback(step, loss_network))
    imitated = settings.imitation_steps > 0
    with _kept(loss_network):
        if imitated and isinstance(loss_network, LossNetwork):  # as was checked
            # of the model's output only the shape, the dtype and the device are used
            prediction = fresh().train()(next(train_batches)[0])
            imitate(loss_network, measured, prediction, steps=settings.imitation_steps)
        (outcome,) = meta_learn(subject, settings, rehearse_first=imitated, callback=look, progress=progress)
    return outcome


def initialise_learning_rate(
    learning_rate: LearningRate,
    make_model: MakeModel,
    train: Iterable[Batch],
    valid: Iterable[Batch],
    *,
    make_optimizer: MakeOptimizer,
    kind: str,
    loss: Loss | None = None,
    settings: Initialiser = DEFAULT,
    validate: Validate | None = None,
    progress: bool = False,
) -> Initialisation:
    """Algorithm 3: meta-learn ``learning_rate`` in place before training with ``loss``, by default the task loss.

    It is :func:`initialise` with α in the place of φ: the same rollouts and rehearsals and so the same budget, and the
    rate to start from rehearsed first, as the imitation of the task loss is there; nothing is imitated.
    ``Initialiser.published()`` is the paper's algorithm. The other arguments are those of :func:`initialise`.
    """
    check_factories(make_model=make_model, make_optimizer=make_optimizer)
    _check_validate(settings, validate)
    check_used("on a learning rate", engine=(settings.engine, "forward"))
    measured, fresh = task_loss(kind), _Fresh(make_model, make_optimizer)
    trained_with = measured if loss is None else loss
    train_batches, meta_batches = pairs(train, "train"), pairs(valid, "valid")
    score = validations(meta_batches, settings, measured, task_error(kind), validate)
    meta_optimizer = torch.optim.Adam(learning_rate.parameters(), lr=settings.rate_for("learning rate"))

    def draw() -> OnlineLearningRate:
        model = fresh().train()
        return OnlineLearningRate(
            model,
            copy.deepcopy(trained_with),  # it may change while it is trained with
            make_optimizer(model.parameters()),
            learning_rate=learning_rate,
            meta_optimizer=meta_optimizer,
            task_loss=measured,
            clip_gradient_norm=settings.clip_gradient_norm,
            clip_gradient_value=settings.clip_gradient_value,
        )

    def rehearse() -> tuple[float, float]:
        def rated(parameters: Iterable[Tensor]) -> Optimizer:
            return learning_rate.give_to(make_optimizer(parameters))

        fixed, steps = copy.deepcopy(trained_with), settings.rehearsal_steps
        return rehearsal(fixed, fresh, rated, train_batches, steps, score, settings.clipping)

    subject = _One(Member(settings.rollout_steps), learning_rate, draw, rehearse, train_batches, meta_batches)
    with _kept(learning_rate):
        (outcome,) = meta_learn(subject, settings, rehearse_first=True, progress=progress)
    return outcome


def initialise_seeds(
    make_loss_network: Callable[[], LossNetwork],
    make_model: MakeModel,
    train: Sequence[Iterable[Batch]],
    valid: Sequence[Iterable[Batch]],
    *,
    make_optimizer: MakeOptimizer,
    seeds: Sequence[int],
    settings: Initialiser = DEFAULT,
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
        settings: of all; without clipping, and of the engine "forward".
        validate: S functions model -> (error, task loss), to score the rehearsals.
        progress: show a progress bar.

    Returns:
        The S loss networks, and what was done to each.

    Raises:
        ValueError, TypeError: the parts do not fit together, or cannot be stacked, with the reason.
        FloatingPointError: every rehearsal of a seed diverged, or one rollout did where the base optimizer counts steps
            (Adam), so that a single seed cannot start over; use ``initialise``.
    """
    check_factories(make_loss_network=make_loss_network, make_model=make_model, make_optimizer=make_optimizer)
    _check_validate(settings, validate)
    if settings.not_for_a_stack:
        raise ValueError(f"{settings.not_for_a_stack} is not for a stack; leave it out, or use initialise")
    counts = {"seeds": len(seeds), "train": len(train), "valid": len(valid)}
    counts |= {} if validate is None else {"validate": len(validate)}
    if not len(seeds) or len(set(counts.values())) != 1:
        raise ValueError(f"give as many of each, at least one: got {', '.join(f'{n} {k}' for k, n in counts.items())}")
    keep_freed_memory()
    members = [Member(settings.rollout_steps, seed) for seed in seeds]
    networks = [member.draw(make_loss_network) for member in members]
    weights = [id(parameter) for network in networks for parameter in network.parameters()]
    if len(set(weights)) < len(weights):
        raise ValueError("make_loss_network returned the same weights for two seeds; it must build fresh ones")
    train_batches, meta_batches = [pairs(b, "train") for b in train], [pairs(b, "valid") for b in valid]
    loss, error = task_loss(networks[0].kind), task_error(networks[0].kind)
    given: Sequence[Validate | None] = [None] * len(seeds) if validate is None else validate
    scores = [validations(b, settings, loss, error, one) for b, one in zip(meta_batches, given, strict=True)]
    fresh = _Fresh(make_model, make_optimizer)
    subject = _Many(members, networks, fresh, make_optimizer, train_batches, meta_batches, scores, settings)
    outcomes = meta_learn(subject, settings, rehearse_first=settings.imitation_steps > 0, progress=progress)
    subject.loss.write_back()
    return networks, outcomes


def _check_validate(settings: Initialiser, validate: object) -> None:
    """Raise for settings that are none, and for a score where nothing is rehearsed."""
    if not isinstance(settings, Initialiser):
        raise TypeError(f"settings must be an Initialiser, got {type(settings).__name__}; use Initialiser(steps=...)")
    if not settings.rehearsals:
        check_used("without rehearsals", validate=(validate, None))


def _frozen(loss_network: nn.Module) -> nn.Module:
    """A copy that is not learned."""
    return copy.deepcopy(loss_network).requires_grad_(False)


class _Fresh:
    """``make_model``, which is refused if it gives a weight again that an earlier model of it has, and trains it.

    One is drawn at once and left alone, with an optimizer, and the random state put back: so the first model that is
    wanted is refused already, before anything was learned with it, and so is an optimizer that cannot train it.
    """

    def __init__(self, make_model: MakeModel, make_optimizer: MakeOptimizer):
        self.make_model = make_model
        # by identity: of the same numbers there may be many
        self.seen: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        random = process_random_state()
        model = self()
        check_has_parameters(model)
        optimizer = make_optimizer(model.parameters())
        check_no_closure(optimizer)
        if not any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            check_trainable(model, optimizer)
        restore_process_random_state(random)

    def __call__(self) -> nn.Module:
        model = self.make_model()
        trained = [parameter for parameter in parameters_of(model) if parameter.requires_grad]
        if any(self.seen.get(id(parameter)) is parameter for parameter in trained):
            raise ValueError(
                "make_model returned weights of an earlier model again; it must build a fresh model at every call, with"
                " what models share frozen: requires_grad_(False)"
            )
        self.seen.update({id(parameter): parameter for parameter in trained})
        return model


@contextmanager
def _kept(learned: nn.Module) -> Iterator[None]:
    """What is learned has its weights again if the block fails."""
    before = copy.deepcopy(learned.state_dict())
    try:
        yield
    except Exception:
        learned.load_state_dict(before)
        raise


class _One:
    """A :class:`~adalfl_lite.learn.meta_learning.Subject` of one: a loss network, or a learning rate."""

    def __init__(
        self,
        member: Member,
        learned: nn.Module,
        draw: Callable[[], OnlineLoss | OnlineLearningRate],
        rehearse: Callable[[], tuple[float, float]],
        train_batches: Iterator[Batch],
        meta_batches: Iterator[Batch],
    ):
        self.members, self.learned, self.draw, self.rehearse_once = [member], learned, draw, rehearse
        self.train_batches, self.meta_batches = train_batches, meta_batches

    def begin(self) -> None:
        """A fresh learner, with a fresh base model."""
        self.learner = self.draw()

    def restart(self, i: int, step: int) -> None:
        """A fresh learner here too: there is no other member to leave alone."""
        self.begin()

    def step(self) -> list[float]:
        """A step of the learner, which leaves everything as it was if it is not finite."""
        try:
            result = self.learner.step(next(self.train_batches), next(self.meta_batches))
        except FloatingPointError:
            return [math.inf]
        return [result.meta_loss.item()]

    def rehearse(self) -> list[tuple[float, float]]:
        """(error, task loss) of a training with what is learned as it is."""
        return [self.rehearse_once()]

    def state(self, i: int) -> dict[str, Tensor]:
        """A copy of what is learned."""
        return {name: tensor.clone() for name, tensor in self.learned.state_dict().items()}

    def restore(self, i: int, state: dict[str, Tensor]) -> None:
        """Let the member have again what :meth:`state` copied."""
        self.learned.load_state_dict(state)


class _Many:
    """A :class:`~adalfl_lite.learn.meta_learning.Subject` of S loss networks over stacked tensors."""

    def __init__(
        self,
        members: Sequence[Member],
        networks: list[LossNetwork],
        fresh: _Fresh,
        make_optimizer: MakeOptimizer,
        train_batches: Sequence[Iterator[Batch]],
        meta_batches: Sequence[Iterator[Batch]],
        scores: Sequence[Validate],
        settings: Initialiser,
    ):
        self.members, self.networks, self.kind = members, networks, networks[0].kind
        self.fresh, self.make_optimizer = fresh, make_optimizer
        self.train_batches, self.meta_batches = train_batches, meta_batches
        self.scores, self.rehearsal_steps = scores, settings.rehearsal_steps
        if settings.imitation_steps:
            # every member draws a model, as it would alone, though one shape serves all
            prediction = [m.draw(fresh) for m in members][0](_stacked(train_batches)[0][0])
        # after the draw above, and before the imitation, which changes φ in the stack
        self.loss = StackedLoss(networks)
        if settings.imitation_steps:

            def outputs() -> Batch:
                drawn = [member.draw(draw_outputs, self.kind, prediction) for member in members]
                return _joined(drawn)

            imitate_stacked(self.loss, self.kind, outputs, steps=settings.imitation_steps)
        self.meta_optimizer = torch.optim.Adam(self.loss.parameters, lr=settings.rate_for("loss"))

    def _models(self) -> tuple[Stack, Optimizer]:
        """Fresh base models of all members, stacked, and their optimizer."""
        models = [member.draw(self.fresh).train() for member in self.members]
        for model in models:
            check_initialised(model)
        check_stackable(models, self.networks)
        stack = Stack(models)
        optimizer = self.make_optimizer(stack.parameters)
        check_elementwise(optimizer)
        return stack, optimizer

    def begin(self) -> None:
        """Fresh base models of all members."""
        self.stack, self.optimizer = self._models()
        self.engine = StackedForward(self.stack, self.loss, self.optimizer, self.kind)

    def restart(self, i: int, step: int) -> None:
        """A fresh base model in the place of one."""
        member = self.members[i]
        self.stack.replace(i, member.draw(self.fresh).train())
        _forget(self.optimizer, i, member.seed, step)

    def step(self) -> list[float]:
        """A step of the stack, and of every φ whose meta-gradient is finite."""
        # no member is refused for what another does: a bad one keeps its φ
        result = self.engine(_stacked(self.train_batches), _stacked(self.meta_batches))
        meta_step(self.meta_optimizer, result)
        return torch.where(result.finite(), torch.as_tensor(result.meta_loss), math.inf).tolist()

    def rehearse(self) -> list[tuple[float, float]]:
        """(error, task loss) of a training with every φ as it is."""
        stack, optimizer = self._models()
        engine = StackedForward(stack, self.loss, optimizer, self.kind)
        for _ in range(self.rehearsal_steps):
            engine(_stacked(self.train_batches))
        stack.write_back()
        return [score(model) for score, model in zip(self.scores, stack.models, strict=True)]

    def state(self, i: int) -> list[Tensor]:
        """A copy of one φ."""
        return [parameter[i].clone() for parameter in self.loss.parameters]

    def restore(self, i: int, state: list[Tensor]) -> None:
        """Let the member have again what :meth:`state` copied."""
        for parameter, best in zip(self.loss.parameters, state, strict=True):
            parameter[i] = best


def _stacked(streams: Sequence[Iterator[Batch]]) -> Batch:
    return _joined([next(stream) for stream in streams])


def _joined(batches: Sequence[Batch]) -> Batch:
    inputs, targets = zip(*batches, strict=True)
    return torch.stack(inputs), torch.stack(targets)


def _forget(optimizer: Optimizer, i: int, seed: int | None, step: int) -> None:
    """Let the optimizer of a stack forget the i-th seed, whose rollout starts over before those of the others."""
    if type(optimizer) is not torch.optim.SGD or any(group["dampening"] for group in optimizer.param_groups):
        raise FloatingPointError(
            f"the rollout of seed {seed} diverged before step {step}, and {type(optimizer).__name__} cannot start over"
            " for one seed of a stack; lower the learning rate, or use initialise"
        )
    for state in optimizer.state.values():
        if (buffer := state.get("momentum_buffer")) is not None:
            # SGD's only memory; a zero buffer is what a fresh one acts like, without dampening
            buffer[i] = 0
