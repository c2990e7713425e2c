"""``fit``: train a base model with any loss, learned online or not, with history, evaluation, checkpoints, resume.

On the CPU the same seed gives the same bits on the same machine, with the same number of threads. On a GPU some kernels
add in an order that changes from run to run (cuDNN's backward convolutions, and backward passes that scatter), so runs
differ in the last bits and, training being chaotic, more and more. ``torch.use_deterministic_algorithms(True)``, with
the environment variable ``CUBLAS_WORKSPACE_CONFIG=:4096:8``, has torch choose kernels that do not, or say which lack.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from adalfl_lite.checks import check_counts, check_finite, check_trainable, check_used
from adalfl_lite.data.dataset import BatchSampler, Dataset, Split
from adalfl_lite.engines.steps import Batch, plain_step
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.files import check_writable
from adalfl_lite.learn.learning_rate import ONLINE_META_LEARNING_RATE, LearningRate, OnlineLearningRate
from adalfl_lite.learn.online import META_LEARNING_RATE, OnlineLoss
from adalfl_lite.losses.task import Loss, task_loss
from adalfl_lite.train.checkpoint import (
    NextBatch,
    describe,
    describe_model,
    describe_optimizer,
    describe_schedule,
    name_of,
    resume_checkpoint,
    save_checkpoint,
    settings_of,
)
from adalfl_lite.train.evaluation import evaluate

EXACT_ENGINES = ("forward", "shared", "unrolled")
"""They give the same numbers, to rounding: a run may be resumed with another of them."""

POLICIES = ("raise", "skip", "restore")
MAX_UNDONE = 10
"""So many steps between two evaluations may be undone before training stops."""

Callback = Callable[[int, nn.Module, Loss], None]
"""Called as (step, model, loss) at every evaluation, step 0 included."""


def fit(
    model: nn.Module,
    loss: Loss,
    data: Dataset,
    *,
    optimizer: Optimizer,
    steps: int,
    batch_size: int = 100,
    online: bool = False,
    learn: str = "loss",
    meta_learning_rate: float | None = None,
    meta_optimizer: Optimizer | Callable[[Iterable[Tensor]], Optimizer] | None = None,
    meta_batches: str = "valid",
    clip_meta_gradient: float | None = None,
    clip_gradient_norm: float | None = None,
    clip_gradient_value: float | None = None,
    engine: str = "forward",
    compile: str | None = None,
    scheduler: LRScheduler | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    evaluate_every: int | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    on_divergence: str = "raise",
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train ``model`` in place and return its history.

    Args:
        model: f_θ, on its device already.
        loss: (prediction, target) -> scalar: a handcrafted loss, or a loss network (frozen, unless ``online``). If it
            has a method ``advance``, that is called after every step, for a loss that changes while it is trained with.
        data: train, valid and test splits; the model never trains on the test split.
        optimizer: base optimizer over ``model.parameters()``.
        steps: base steps T.
        batch_size: rows per training batch, and per meta batch where its split has as many.
        online: adapt what ``learn`` names after every step.
        learn: "loss" (Algorithm 2; ``loss`` must then be a module with parameters), or "learning_rate" (Algorithm 4).
        meta_learning_rate, clip_meta_gradient, engine, compile: see :class:`~adalfl_lite.learn.online.OnlineLoss`, and
            :class:`~adalfl_lite.learn.learning_rate.OnlineLearningRate`, which has the first alone.
        clip_gradient_norm, clip_gradient_value: clip ∇_θ of the loss before the optimizer has it, as torch's
            ``clip_grad_norm_`` and ``clip_grad_value_`` do; what is learned online is learned through it.
        meta_optimizer: instead of Adam with ``meta_learning_rate``: a function parameters -> optimizer, or where the
            loss is learned also an optimizer over ``loss.parameters()``.
        meta_batches: "valid"; "train" to adapt on training rows alone (the paper allows both); or "next", where the
            meta batch of a step is the training batch of the next one, so that ``engine="shared"`` saves a pass.
        scheduler: over ``optimizer``, advanced after every step; such as torch's ``MultiStepLR``, or the recorded
            schedule of another run, :func:`~adalfl_lite.learn.learning_rate.replay`.
        augment: changes the inputs of a training batch at random, such as
            :func:`~adalfl_lite.data.augmentation.crop_and_flip`; batches of the valid split stay as they are.
        seed: seeds the order of the batches; seed torch yourself before drawing ``model``.
        evaluate_every: steps between evaluations; a twentieth of the run by default.
        callback: called at every evaluation with (step, model, loss).
        checkpoint: file to save to at every evaluation and, if it exists, to resume from, bit for bit on the CPU (but
            for dropout where ``engine="shared"`` and ``augment`` meet); a finished run is returned as it was. What the
            model, the loss and the optimizers hold is then the file's. Run it with the same arguments: others are
            refused, but for ``device``, ``compile`` and one exact engine instead of another, which round differently.
        on_divergence: what to do about a step that is not finite. "raise" stops; the checkpoint keeps the last
            evaluation. "skip" undoes the step, and "restore" goes back to the last evaluation; both warn, go on with
            the next batch, and stop at the eleventh such step between two evaluations. They cost a look at the
            parameters per step, and "skip" a copy of them.
        device: where to train; the model must be there already. By default where the model is.
        autocast: dtype for the model's passes, such as ``torch.bfloat16``.
        progress: show a progress bar.

    Returns:
        One row per evaluation: step, train_loss (mean of the loss trained with, since the last row), meta_loss (mean
        L_T on meta batches, online only), valid_error, valid_loss, test_error, test_loss (L_T), learning_rate
        (of the first parameter group), seconds (training alone, evaluation excluded). Errors are rates in [0, 1] or
        mean squared errors.

    Raises:
        ValueError: arguments that do not fit together, or that would have no effect, or a checkpoint of another run.
        TypeError: the data are no :class:`~adalfl_lite.data.dataset.Dataset`, or the optimizer is none that fit can
        use. OSError: the checkpoint cannot be written.
        FloatingPointError: the loss, a parameter or a meta-gradient is not finite; step and tensor are named, and the
            last checkpoint is kept.
    """
    check_counts(steps=steps, evaluate_every=1 if evaluate_every is None else evaluate_every)
    if not isinstance(data, Dataset):
        raise TypeError(f"data must be a Dataset, got {type(data).__name__}; load_dataset and Dataset(...) give one")
    if on_divergence not in POLICIES:
        raise ValueError(f"on_divergence must be one of {', '.join(POLICIES)}; got {on_divergence!r}")
    if meta_batches not in ("valid", "train", "next"):
        raise ValueError(f"meta_batches must be 'valid', 'train' or 'next', got {meta_batches!r}")
    if engine == "shared" and meta_batches != "next":
        raise ValueError(f"engine='shared' needs meta_batches='next', got {meta_batches!r}")
    if learn not in ("loss", "learning_rate"):
        raise ValueError(f"learn must be 'loss' or 'learning_rate', got {learn!r}")
    if compile is not None and not (online and learn == "loss"):
        raise ValueError("compile is for a loss that is learned online; leave it out, or hand fit torch.compile(model)")
    if online and learn == "learning_rate" and scheduler is not None:
        raise ValueError("a learned learning rate and a scheduler exclude each other; leave one out")
    clipping = Clipping(clip_gradient_norm, clip_gradient_value)
    of_loss: dict[str, Any] = {"engine": (engine, "forward"), "clip_meta_gradient": (clip_meta_gradient, None)}
    if not online:
        of_both = {"meta_learning_rate": (meta_learning_rate, None), "meta_optimizer": (meta_optimizer, None)}
        of_run = {"learn": (learn, "loss"), "meta_batches": (meta_batches, "valid")}
        check_used("without online=True", **of_both, **of_run, **of_loss)
    elif learn == "learning_rate":
        check_used("on a learned learning rate", **of_loss)
    if meta_optimizer is not None and meta_learning_rate is not None:
        raise ValueError("meta_learning_rate has no effect on a meta_optimizer of your own; leave one of the two out")
    if learn == "learning_rate" and isinstance(meta_optimizer, Optimizer):
        raise ValueError(
            "the learning rate is a parameter that fit makes, which this meta_optimizer does not hold; give a function"
            " that builds one, such as functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16 or torch.float16, got {autocast}; leave it out for neither")
    _check_scheduler(scheduler, optimizer)
    trainable = isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters())
    if online and learn == "loss" and not trainable:
        raise ValueError("online=True needs a loss with trainable parameters, such as a LossNetwork")
    evaluate_every = evaluate_every or max(1, steps // 20)
    if getattr(loss, "kind", data.kind) != data.kind:
        raise ValueError(f"the loss is for {loss.kind}, the data set {data.name!r} for {data.kind}")  # type: ignore
    device = _device_of(model, device)
    check_trainable(model, optimizer)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is not None:
        raise TypeError(f"{type(optimizer).__name__} needs a closure, which fit has not; use one such as SGD or Adam")
    if checkpoint is not None:
        check_writable(checkpoint)
    if isinstance(loss, nn.Module):
        loss.to(device)
    train = data.train.to(device)
    meta = data.valid.to(device) if meta_batches == "valid" else train
    held_out = {"valid": data.valid.to(device), "test": data.test.to(device)}
    batches = BatchSampler(len(train), batch_size, seed)
    if meta_batches == "next":
        metas = BatchSampler(len(train), batch_size, seed)
        next(metas)  # one batch ahead
    else:
        metas = BatchSampler(len(meta), min(batch_size, len(meta)), seed + 1)

    if meta_learning_rate is None:
        meta_learning_rate = META_LEARNING_RATE if learn == "loss" else ONLINE_META_LEARNING_RATE
    learner: OnlineLoss | OnlineLearningRate | None = None
    if online and learn == "learning_rate":
        rate = None
        if meta_optimizer is not None:
            rate = LearningRate.of(optimizer)
            meta_optimizer = _built(meta_optimizer, rate)
        learner = OnlineLearningRate(
            model,
            loss,
            optimizer,
            learning_rate=rate,
            meta_optimizer=meta_optimizer,
            meta_learning_rate=meta_learning_rate,
            task_loss=task_loss(data.kind),
            clip_gradient_norm=clip_gradient_norm,
            clip_gradient_value=clip_gradient_value,
            autocast=autocast,
        )
    elif online and isinstance(loss, nn.Module):
        meta_optimizer = None if meta_optimizer is None else _built(meta_optimizer, loss)
        learner = OnlineLoss(
            model,
            loss,
            optimizer,
            meta_optimizer=meta_optimizer,
            meta_learning_rate=meta_learning_rate,
            task_loss=task_loss(data.kind),
            clip_meta_gradient=clip_meta_gradient,
            clip_gradient_norm=clip_gradient_norm,
            clip_gradient_value=clip_gradient_value,
            engine=engine,
            autocast=autocast,
            compile=compile,
        )
    run = {
        **describe(optimizer, data),
        "model": describe_model(model),
        "loss": name_of(loss),
        "loss_settings": settings_of(loss),
        "steps": steps,
        "batch_size": batch_size,
        "online": online,
        "augment": name_of(augment) if augment else None,
        "augment_settings": settings_of(augment),
        "scheduler": describe_schedule(scheduler, steps),
        "seed": seed,
        "evaluate_every": evaluate_every,
        "on_divergence": on_divergence,
        "autocast": None if autocast is None else str(autocast),
        "clip_gradient_norm": clip_gradient_norm,
        "clip_gradient_value": clip_gradient_value,
    }
    if online:
        run |= {
            "learn": learn,
            "meta_batches": meta_batches,
            "meta_learning_rate": meta_learning_rate,
            "meta_optimizer": describe_optimizer(meta_optimizer) if isinstance(meta_optimizer, Optimizer) else None,
            "clip_meta_gradient": clip_meta_gradient,
            "engine": None if engine in EXACT_ENGINES else engine,
        }
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": batches, "metas": metas}
    if isinstance(loss, nn.Module):
        parts["loss"] = loss
    if learner:
        parts["meta_optimizer"] = learner.meta_optimizer
    if isinstance(learner, OnlineLearningRate):
        parts["learned_rate"] = learner.learning_rate
    if scheduler:
        parts["scheduler"] = scheduler
    drawn = NextBatch(device)
    if meta_batches == "next":
        parts["next_batch"] = drawn
    history: list[dict] = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = resume_checkpoint(checkpoint, run, parts)
    start, seconds = (history[-1]["step"], history[-1]["seconds"]) if history else (0, 0.0)

    def read(split: Split, rows: Tensor) -> Batch:
        inputs, targets = split[rows]
        return (augment(inputs), targets) if augment and split is train else (inputs, targets)

    def record(step: int, train_loss: float, meta_loss: float) -> None:
        row = {"step": step, "train_loss": train_loss, "meta_loss": meta_loss}
        for name, split in held_out.items():
            row[f"{name}_error"], row[f"{name}_loss"] = evaluate(model, split, data.kind)
        history.append({**row, "learning_rate": float(optimizer.param_groups[0]["lr"]), "seconds": seconds})
        if callback:
            callback(step, model, loss)

    model.train()
    if not history:
        record(0, math.nan, math.nan)
    losses: list[Tensor] = []
    meta_losses: list[Tensor] = []
    learned = {name: part for name, part in parts.items() if part not in (batches, metas, drawn)}
    good = _states(learned) if on_divergence == "restore" else {}
    undone = 0
    clock = time.perf_counter()
    bar = tqdm(range(start + 1, steps + 1), initial=start, total=steps, disable=not progress, leave=None, desc="fit")
    for step in bar:
        rows = next(batches)
        batch = drawn.batch or read(train, rows)
        if on_divergence == "skip":
            good = _states(learned)
        try:
            if learner:
                meta_batch = read(meta, next(metas))
                drawn.batch = meta_batch if meta_batches == "next" else None
                result = learner.step(batch, meta_batch)
                losses.append(result.learned_loss)
                meta_losses.append(result.task_loss)
            else:
                value = plain_step(model, loss, optimizer, batch, clipping=clipping, autocast=autocast)
                if on_divergence != "raise":
                    _check_step(value, model)
                losses.append(value)
            if scheduler:
                scheduler.step()
        except FloatingPointError as error:
            if on_divergence == "raise" or undone == MAX_UNDONE:
                raise FloatingPointError(f"step {step}: {error}") from error
            warnings.warn(f"step {step}: {error}; {on_divergence} and go on", RuntimeWarning, stacklevel=2)
            for name, state in copy.deepcopy(good).items():
                learned[name].load_state_dict(state)
            undone += 1
        if step % evaluate_every == 0 or step == steps:
            if on_divergence == "raise":
                _check_since(losses, step, model)
            means = [torch.stack(kept).mean().item() if kept else math.nan for kept in (losses, meta_losses)]
            losses, meta_losses, undone = [], [], 0
            seconds += time.perf_counter() - clock
            record(step, *means)
            bar.set_postfix(train_loss=f"{means[0]:.3g}", valid_error=f"{history[-1]['valid_error']:.3g}")
            clock = time.perf_counter()
            if on_divergence == "restore":
                good = _states(learned)
            if checkpoint is not None:
                save_checkpoint(checkpoint, run, parts, history)
    return pd.DataFrame(history)


def _device_of(model: nn.Module, wanted: torch.device | str | None) -> torch.device:
    """The device of the model's parameters; ``ValueError`` if that is not the one that is wanted."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"the model has no parameters: there is nothing to train in a {type(model).__name__}")
    try:
        device = parameter.device if wanted is None else torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise ValueError(f"cannot train on device {str(wanted)!r}: {str(error).splitlines()[0]}") from error
    if device != parameter.device:
        raise ValueError(
            f"the model is on {parameter.device}, not on {device}; "
            f"move it with model.to({str(device)!r}) before building its optimizer"
        )
    return device


def _check_step(loss: Tensor, model: nn.Module) -> None:
    """Raise ``FloatingPointError`` unless the loss of a plain step, its gradient and its result are finite."""
    named = dict(model.named_parameters())
    gradients = {f"gradient of {name}": p.grad for name, p in named.items() if p.grad is not None}
    check_finite({"loss": loss, **gradients, **{f"parameter {name}": p for name, p in named.items()}}, model)


def _check_since(losses: list[Tensor], step: int, model: nn.Module) -> None:
    """The same for all steps since the last evaluation at once, up to ``step``, without a look at each."""
    finite = torch.isfinite(torch.stack(losses)).tolist()
    first = finite.index(False) if False in finite else len(finite) - 1
    try:
        _check_step(losses[first], model)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step - len(finite) + 1 + first}: {error}") from None


def _check_scheduler(scheduler: LRScheduler | None, optimizer: Optimizer) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau needs a metric at every step, which fit does not give; use a schedule of the step alone,"
            " such as MultiStepLR"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("the scheduler is of another optimizer; build it from the one that is given to fit")


def _built(make: Optimizer | Callable[[Iterable[Tensor]], Optimizer], learned: nn.Module) -> Optimizer:
    """The meta-optimizer itself, if what is given is a function."""
    if isinstance(make, Optimizer):
        return make
    built = make(learned.parameters()) if callable(make) else make
    if not isinstance(built, Optimizer):
        raise TypeError(
            f"meta_optimizer must be an optimizer or a function that builds one, got {type(built).__name__}; give one"
            " such as functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    return built


def _states(parts: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
