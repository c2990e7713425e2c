"""One call for what takes two lines, with settings by name: for tests that run over tables of settings."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

from adalfl_lite import Initialiser, OnlineLearningRate, OnlineLoss, Plain, Stacked, learn
from adalfl_lite import fit as fit_learner
from adalfl_lite.compare.methods import Method
from adalfl_lite.compare.recipes import Learned, LearnedRate, SymbolicSearch, TaylorSearch
from adalfl_lite.engines.base import Problem
from adalfl_lite.engines.finite_difference import FiniteDifference
from adalfl_lite.engines.forward import Forward
from adalfl_lite.engines.unrolled import Unrolled
from adalfl_lite.losses.task import task_loss

OF_LEARNER = (
    *("meta_learning_rate", "meta_optimizer", "clip_meta_gradient", "clip_gradient_norm", "clip_gradient_value"),
    *("engine", "compile", "autocast", "learning_rate"),
)


def learner(model, loss, optimizer, *, kind=None, online=False, learn="loss", **settings):
    """A learner: Plain, OnlineLoss (``online``) or OnlineLearningRate (``learn="learning_rate"``)."""
    if not online:
        settings = {name: value for name, value in settings.items() if value is not None}
        return Plain(model, loss, optimizer, **settings)
    make = OnlineLoss if learn == "loss" else OnlineLearningRate
    make_meta = settings.get("meta_optimizer")
    if isinstance(make_meta, partial):
        if learn == "learning_rate":
            from adalfl_lite.learn.learning_rate import LearningRate

            settings["learning_rate"] = LearningRate.of(optimizer)
            settings["meta_optimizer"] = make_meta(settings["learning_rate"].parameters())
        else:
            settings["meta_optimizer"] = make_meta(loss.parameters())
    if kind is not None:
        settings["task_loss"] = task_loss(kind)
    return make(model, loss, optimizer, **settings)


def fit(model, loss, data, *, optimizer, online=False, learn="loss", **options):
    """``fit`` of a learner that is made of the settings among the options."""
    settings = {name: options.pop(name) for name in OF_LEARNER if name in options}
    kind = getattr(data, "kind", None)
    return fit_learner(
        learner(model, loss, optimizer, kind=kind, online=online, learn=learn, **settings), data, **options
    )


def fit_seeds(models, losses, data, *, make_optimizer, seeds, online=False, learn="loss", **options):
    """``fit`` of a stack; ``losses`` None: the task loss."""
    settings = {name: options.pop(name) for name in OF_LEARNER if name in options}
    kind = data.kind if hasattr(data, "kind") else data[0].kind
    losses = [task_loss(kind)] * len(models) if losses is None else losses
    members = [
        learner(model, loss, make_optimizer(model.parameters()), online=online, learn=learn, **settings)
        for model, loss in zip(models, losses, strict=True)
    ]
    return fit_learner(Stacked(members), data, seed=list(seeds), **options)


def forward_mode_step(model, network, optimizer, batch, meta_batch, loss, *, finite_difference=False, **settings):
    """A step of the engine "forward", or of "finite-difference"."""
    engine = FiniteDifference if finite_difference else Forward
    return engine(Problem(model, network, optimizer, loss, **settings))(batch, meta_batch)


def unrolled_step(model, network, optimizer, batches, meta_batch, loss, **settings):
    """One step or several of the engine "unrolled"."""
    return Unrolled(Problem(model, network, optimizer, loss, **settings)).unroll(batches, meta_batch)


OF_INITIALISER = [field.name for field in fields(Initialiser)]


def initialise(*arguments, **options):
    """``initialise`` with the settings of Algorithm 1 among its options."""
    return _with_settings(learn.initialise, arguments, options)


def initialise_learning_rate(*arguments, **options):
    """``initialise_learning_rate`` likewise."""
    return _with_settings(learn.initialise_learning_rate, arguments, options)


def initialise_seeds(*arguments, **options):
    """``initialise_seeds`` likewise."""
    return _with_settings(learn.initialise_seeds, arguments, options)


def _with_settings(function, arguments, options):
    settings = {name: options.pop(name) for name in OF_INITIALISER if name in options}
    return function(*arguments, settings=Initialiser(**settings), **options)


def short(method: Method, *, steps=40, rehearsal_steps=15, imitation_steps=20, searched=None, scored_steps=10, local=5):
    """The same method with short searches (generations, population), initialisations and rehearsals."""
    loss, rate, searched = method.loss, method.rate, searched or (2, 4)
    few = {"steps": steps, "rehearsal_steps": rehearsal_steps}
    if isinstance(loss, Learned):
        loss = replace(loss, settings=loss.settings.with_(**few))
        if loss.settings.imitation_steps:
            loss = replace(loss, settings=loss.settings.with_(imitation_steps=imitation_steps))
    elif isinstance(loss, TaylorSearch | SymbolicSearch):
        loss = replace(loss, generations=searched[0], population=searched[1], scored_steps=scored_steps)
        if isinstance(loss, SymbolicSearch):
            loss = replace(loss, local=loss.local.with_(steps=local))
    if isinstance(rate, LearnedRate):
        rate = replace(rate, settings=rate.settings.with_(**few))
    return replace(method, loss=loss, rate=rate)
