"""All seeds at once: S runs of :func:`~adalfl_lite.training.fit` as one program over stacked tensors.

Small models leave a processor idle: a step on a batch of digits is a hundred kernels of a few microseconds each. Here
θ, φ, both optimizers' states and the batches carry a leading dimension S, and one step advances every seed:

- the models by ``torch.func.vmap``, their tangents u = J_f w by ``torch.func.jvp`` around it;
- the loss networks by :mod:`adalfl_lite.closed_form`, which takes stacked weights, so ∂M_φ/∂f needs no backward pass;
- the optimizers as they are: SGD, Adam and AdamW treat every entry alike, and do not mind a stacked tensor.

The seeds never meet: each ends where its own ``fit`` would, to rounding.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from tqdm import tqdm

from adalfl_lite.closed_form import Layer, layers_of, mixed_gradient, value_and_slope
from adalfl_lite.data import BatchSampler, Dataset, Split
from adalfl_lite.initialisation import MakeOptimizer
from adalfl_lite.losses import LossNetwork
from adalfl_lite.online import META_LEARNING_RATE
from adalfl_lite.training import evaluate
from adalfl_lite.updates import RULES, update_pullback


def fit_seeds(
    models: Sequence[nn.Module],
    losses: Sequence[LossNetwork] | None,
    data: Dataset | Sequence[Dataset],
    *,
    make_optimizer: MakeOptimizer,
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 100,
    online: bool = False,
    meta_learning_rate: float = META_LEARNING_RATE,
    meta_batches: str = "valid",
    evaluate_every: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train every model with its loss, all in step, in place; what ``fit`` does for one of each.

    Args:
        models: S models f_θ of one architecture, on one device, without dropout. BatchNorm keeps statistics per model.
        losses: S loss networks of one architecture; None trains with the task loss.
        data: one data set for all, or S of equal sizes.
        make_optimizer: parameters -> the base optimizer: SGD, Adam or AdamW.
        seeds: S seeds of the batch orders.
        steps, batch_size, online, meta_learning_rate, meta_batches, evaluate_every, progress: as in
            :func:`~adalfl_lite.training.fit`.

    Returns:
        The histories of the S runs below each other, with a first column ``seed``; seconds are the program's.

    Raises:
        ValueError, TypeError: the parts do not fit together, or cannot be stacked, with the reason.
        FloatingPointError: a loss stopped being finite; its seeds are named.
    """
    datasets = [data] * len(seeds) if isinstance(data, Dataset) else list(data)
    networks = None if losses is None else list(losses)
    _check(models, networks, datasets, seeds, steps, online, meta_batches)
    kind, device = datasets[0].kind, next(models[0].parameters()).device
    train = [d.train.to(device) for d in datasets]
    meta = [getattr(d, meta_batches).to(device) for d in datasets]
    held_out = {name: [getattr(d, name).to(device) for d in datasets] for name in ("valid", "test")}
    batches = [BatchSampler(len(train[0]), batch_size, seed) for seed in seeds]
    metas = [BatchSampler(len(meta[0]), min(batch_size, len(meta[0])), seed + 1) for seed in seeds]
    evaluate_every = evaluate_every or max(1, steps // 20)

    # Freed at once, this has glibc keep the memory of a step for the next one instead of handing it back each time.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    stack = Stack(models)
    optimizer = make_optimizer(stack.parameters)
    if type(optimizer) not in RULES:
        raise TypeError(f"{type(optimizer).__name__} is not known to treat every entry alike; use SGD, Adam or AdamW")
    loss = None if networks is None else StackedLoss(networks)
    meta_optimizer = torch.optim.Adam(loss.parameters, lr=meta_learning_rate) if loss and online else None

    history: list[dict] = []
    seconds = 0.0

    def record(step: int, train_losses: Tensor, meta_losses: Tensor) -> None:
        stack.write_back()
        for i, (seed, model) in enumerate(zip(seeds, models, strict=True)):
            row = {"seed": seed, "step": step, "train_loss": train_losses[i].item(), "meta_loss": meta_losses[i].item()}
            for name, splits in held_out.items():
                row[f"{name}_error"], row[f"{name}_loss"] = evaluate(model, splits[i], kind)
            history.append({**row, "seconds": seconds})

    nothing = torch.full((len(seeds),), math.nan)
    record(0, nothing, nothing)
    kept: list[tuple[Tensor, Tensor]] = []
    clock = time.perf_counter()
    for step in tqdm(range(1, steps + 1), disable=not progress, desc=f"{len(seeds)} seeds"):
        inputs, targets = _draw(train, batches)
        meta_batch = _draw(meta, metas) if meta_optimizer else None
        learned, task = _step(stack, loss, optimizer, meta_optimizer, kind, inputs, targets, meta_batch)
        finite = learned.isfinite() & task.isfinite()
        if not finite.all():
            named = ", ".join(str(seed) for seed, good in zip(seeds, finite.tolist(), strict=True) if not good)
            raise FloatingPointError(f"a loss of seed {named} was not finite in step {step}; lower the learning rate")
        kept.append((learned, task))
        if step % evaluate_every == 0 or step == steps:
            seconds += time.perf_counter() - clock
            means = [torch.stack(values).mean(0) for values in zip(*kept, strict=True)]
            record(step, means[0], means[1] if meta_optimizer else nothing)
            kept, clock = [], time.perf_counter()
    if loss:
        loss.write_back()
    return pd.DataFrame(history).sort_values(["seed", "step"], kind="stable", ignore_index=True)


def _step(
    stack: Stack,
    loss: StackedLoss | None,
    optimizer: torch.optim.Optimizer,
    meta_optimizer: torch.optim.Optimizer | None,
    kind: str,
    inputs: Tensor,
    targets: Tensor,
    meta_batch: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 2's two updates for every seed; the learned losses and the task losses, both (S,)."""
    before = [p.detach().clone() for p in stack.parameters] if meta_batch else []
    buffers = {name: buffer.clone() for name, buffer in stack.buffers.items()}
    prediction = stack(stack.parameters, stack.buffers, inputs)
    if loss is None:
        learned = task_losses(kind, prediction, targets)
        gradients = torch.autograd.grad(learned.sum(), stack.parameters)
    else:
        learned, output_gradient, derivative = loss.derivatives(prediction.detach(), targets)
        gradients = torch.autograd.grad(prediction, stack.parameters, output_gradient)
    pullback = update_pullback(optimizer, gradients)
    for parameter, gradient in zip(stack.parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    if loss is None or meta_optimizer is None or meta_batch is None:
        return learned.detach(), learned.detach()

    meta_buffers = {name: buffer.clone() for name, buffer in stack.buffers.items()}
    task = task_losses(kind, stack(stack.parameters, meta_buffers, meta_batch[0]), meta_batch[1])
    w = pullback(torch.autograd.grad(task.sum(), stack.parameters))

    def output(*theta: Tensor) -> Tensor:
        return stack(theta, {name: buffer.clone() for name, buffer in buffers.items()}, inputs)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # by torch itself
        tangent = jvp(output, tuple(before), tuple(w))[1]
    for parameter, gradient in zip(loss.parameters, derivative(tangent), strict=True):
        parameter.grad = gradient
    meta_optimizer.step()
    return learned, task.detach()


def task_losses(kind: str, prediction: Tensor, targets: Tensor) -> Tensor:
    """L_T of every seed, (S,), for predictions (S, B, C)."""
    if kind == "classification":
        return (
            F.cross_entropy(prediction.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)
        )
    return (prediction - targets).square().flatten(1).mean(1)


class Stack:
    """S models as one function of stacked parameters and buffers."""

    def __init__(self, models: Sequence[nn.Module]):
        self.models = models
        self.model = copy.deepcopy(models[0]).train()
        self.names = [name for name, _ in self.model.named_parameters()]
        rows = zip(*(model.parameters() for model in models), strict=True)
        self.parameters = [torch.stack([p.detach() for p in row]).requires_grad_() for row in rows]
        buffers = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([row[name] for row in buffers]) for name in buffers[0]}

    def __call__(self, parameters: Sequence[Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """(S, B, C) for inputs (S, B, ...); ``buffers`` are updated in place, as in train mode."""

        def one(theta: dict[str, Tensor], state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.model, {**theta, **state}, (x,))

        return vmap(one)(dict(zip(self.names, parameters, strict=True)), buffers, inputs)

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the S models to where the stack is."""
        for i, model in enumerate(self.models):
            for parameter, stacked in zip(model.parameters(), self.parameters, strict=True):
                parameter.copy_(stacked[i])
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name][i])


Along = Callable[[Tensor], list[Tensor]]


class StackedLoss:
    """S loss networks as one; ``parameters`` are φ, stacked."""

    def __init__(self, networks: Sequence[LossNetwork]):
        self.networks = networks
        rows = zip(*(network.parameters() for network in networks), strict=True)
        self.parameters = [torch.stack([p.detach() for p in row]) for row in rows]

    def derivatives(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Along]:
        """M_φ (S,), ∂M_φ/∂f (S, B, C), and the function u ↦ ∇_φ ⟨∂M_φ/∂f, u⟩ of a tangent (S, B, C)."""
        first = self.networks[0]
        layers: list[Layer] = layers_of(first.network, self.parameters) or []
        shape, points = prediction.shape, prediction.flatten(1).shape[1]
        count = points if first.reduction == "mean" else shape[1]
        output, targets = prediction, target
        if first.kind == "classification":
            output, targets = prediction.softmax(-1), F.one_hot(target, shape[-1]).to(prediction.dtype)
        y, p = targets.flatten(1), output.flatten(1)
        if first.anchored:  # the Bregman form also needs value and slope at p = y
            y, p = torch.cat([y, y], 1), torch.cat([p, y], 1)
        value, slope, tape = value_and_slope(layers, y, p)
        if first.anchored:
            slope, base = slope[:, :points] - slope[:, points:], slope[:, points:]
            value = value[:, :points] - value[:, points:] - base * (p - y)[:, :points]

        def to_logits(vector: Tensor) -> Tensor:
            """Along the softmax, whose Jacobian is symmetric; nothing to do in regression."""
            if first.kind == "regression":
                return vector
            return output * (vector - (output * vector).sum(-1, keepdim=True))

        def along(tangent: Tensor) -> list[Tensor]:
            weights = to_logits(tangent).flatten(1) / count
            return mixed_gradient(tape, torch.cat([weights, -weights], 1) if first.anchored else weights)

        return value.sum(1) / count, to_logits(slope.view(shape)) / count, along

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the S loss networks to where the stack is."""
        for i, network in enumerate(self.networks):
            for parameter, stacked in zip(network.parameters(), self.parameters, strict=True):
                parameter.copy_(stacked[i])


def _draw(splits: Sequence[Split], samplers: Sequence[BatchSampler]) -> tuple[Tensor, Tensor]:
    pairs = [split[next(sampler)] for split, sampler in zip(splits, samplers, strict=True)]
    inputs, targets = zip(*pairs, strict=True)
    return torch.stack(inputs), torch.stack(targets)


def _check(
    models: Sequence[nn.Module],
    losses: Sequence[LossNetwork] | None,
    datasets: Sequence[Dataset],
    seeds: Sequence[int],
    steps: int,
    online: bool,
    meta_batches: str,
) -> None:
    counts = {"models": len(models), "data sets": len(datasets), "seeds": len(seeds)}
    counts |= {} if losses is None else {"losses": len(losses)}
    if not seeds or len(set(counts.values())) != 1:
        raise ValueError(f"give as many of each, at least one: got {', '.join(f'{n} {k}' for k, n in counts.items())}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if meta_batches not in ("valid", "train"):
        raise ValueError(f"meta_batches must be 'valid' or 'train', got {meta_batches!r}")
    if online and losses is None:
        raise ValueError("online=True needs loss networks to adapt; give losses")
    networks = losses or []
    for name, modules in (("models", models), ("losses", networks)):
        shapes = [
            [(key, value.shape, value.dtype, value.device) for key, value in m.state_dict().items()] for m in modules
        ]
        if any(other != shapes[0] for other in shapes[1:]):
            raise ValueError(f"the {name} differ in parameters, dtype or device; all must be of one architecture")
    for module in models[0].modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError("dropout draws other numbers in a stack than alone; train such models with fit")
    if any(not parameter.requires_grad for parameter in models[0].parameters()):
        raise ValueError("some parameters are frozen; train such models with fit")
    for network in networks:
        if type(network) is not LossNetwork or layers_of(network.network) is None:
            raise TypeError(f"{type(network).__name__} cannot be stacked; give LossNetworks of known layers")
        if str(network) != str(networks[0]):
            raise ValueError("the losses differ in kind, layers or anchor; all must be of one architecture")
    sizes = {(d.kind, len(d.train), len(d.valid), d.input_shape, d.outputs) for d in datasets}
    if len(sizes) != 1:
        raise ValueError(f"the data sets differ in kind or size: {sizes}")
