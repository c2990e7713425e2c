"""A judge of single steps that shares no code with the package: the plain training loop, and differences of it in φ.

A *problem* is a model, an optimizer and batches, built anew, equal to the last bit, whenever it is started. The plain
loop is ``phi(model(x), y).backward(); optimizer.step()``, in float64. With θ'(φ) where it leads, and v the ordinary
gradient of the task loss at θ'(φ) on the next batch, taken by ``backward()`` as well, the derivative of L_T along a
direction d of φ is

    d/dh <v, θ'(φ + h d)>   at h = 0,                                                                    (1)

taken by central differences at h, h/2 and h/4 and Romberg's extrapolation, whose last correction bounds the error:
it must be a fiftieth of the tolerance, else the reference gives up loudly. Kinks of the model (ReLU, pooling) do no
harm, for θ stands still while φ moves.

Random numbers are seeded before the training pass; the meta pass draws the numbers that follow. Hooks that a problem
attaches shape the training alone: they are taken off before v is computed, and v is the derivative of L_T.

A step is *right* if θ', the optimizer's state, the buffers, the losses and the random state are the plain loop's and
the meta-gradient along d is (1). It is *refused* if an error with a message was raised and nothing at all had changed.
Everything else is a *fault*.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from adalfl_lite import LossNetwork, OnlineLoss

ENGINES = ("forward", "shared", "unrolled")
REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)
TOLERANCE = 1e-6
STEPS_OF_PHI = (1e-3, 2e-4, 5e-3, 2e-2)
"""h, the first at which the reference is accurate enough."""

Batch = tuple[Tensor, Tensor]


class InaccurateError(AssertionError):
    """The differences do not settle, so nothing can be compared with them."""


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def classification() -> LossNetwork:
    """M_φ, steep; with this β torch's softplus is not cut off, and all is smooth at the scale of h."""
    return _steep(LossNetwork.classification(hidden=(8, 8), beta=2.0, generator=torch.Generator().manual_seed(5)))


def regression() -> LossNetwork:
    return LossNetwork.regression(hidden=(8, 8), beta=2.0, generator=torch.Generator().manual_seed(5)).double()


def _steep(phi: LossNetwork) -> LossNetwork:
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.mul_(2)
    return phi.double()


def rows(seed: int, count: int = 12, width: int = 6, classes: int = 4) -> Batch:
    """Inputs (count, width) and classes (count,)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(classes, (count,), generator=generator)


def sequences(seed: int, count: int = 12, length: int = 5, width: int = 3) -> Batch:
    inputs, targets = rows(seed, count, length * width)
    return inputs.view(count, length, width), targets


def images(seed: int, count: int = 6, channels: int = 2, size: int = 6) -> Batch:
    inputs, targets = rows(seed, count, channels * size * size)
    return inputs.view(count, channels, size, size), targets


def tokens(seed: int, count: int = 12, length: int = 3, words: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(words, (count, length), generator=generator)
    return inputs, torch.randint(4, (count,), generator=generator)


def reals(seed: int, count: int = 12, width: int = 6, outputs: int = 2) -> Batch:
    """For regression: inputs (count, width) and targets (count, outputs)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(count, outputs, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """What a user brings."""

    make: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer] = sgd
    batches: Callable[[int], Batch] = rows
    """Seed -> batch; a new copy with every call."""
    attach: Callable[[nn.Module, Optimizer], Iterable[Any] | None] | None = None
    """Called before the first judged step; returns handles with ``remove()``."""
    between: Callable[[nn.Module, Optimizer], Any] | None = None
    """Called between two judged steps."""
    observe: Callable[[nn.Module, Optimizer], Any] | None = None
    """Something else that must end as the plain loop leaves it."""
    phi: Callable[[], nn.Module] = classification
    training: bool = True
    warm: int = 2
    """Plain steps before, so that an optimizer's moments are not empty."""
    steps: int = 2
    """Steps that are judged; with engine "shared" the second takes up what the first one kept."""
    directions: int = 1
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Verdict:
    kind: str
    """right, refused or fault."""
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


@dataclass(frozen=True)
class Plain:
    """What one step of the plain loop leaves, and the derivative of the task loss behind it."""

    after: dict[str, Any]
    moved: float
    """The longest way of an entry of θ in this step."""
    training_loss: Tensor
    meta_loss: Tensor
    slopes: list[tuple[list[Tensor], float]] = field(default_factory=list)
    """Directions of φ, each with equation (1)."""


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def task_loss(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    return F.mse_loss if problem.batches(0)[1].is_floating_point() else F.cross_entropy


@contextmanager
def started(problem: Problem) -> Iterator[tuple[nn.Module, Optimizer, list[Any]]]:
    """(model, optimizer, handles of what was attached), the same to the last bit each time."""
    seed_everything(7)
    model = problem.make().double().train(problem.training)
    optimizer = problem.optimizer(model)
    loss = task_loss(problem)
    for i in range(problem.warm):
        optimizer.zero_grad()
        inputs, targets = problem.batches(100 + i)
        loss(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    handles: list[Any] = []
    try:
        if problem.attach is not None:
            handles += problem.attach(model, optimizer) or []
        seed_everything(3)
        yield model, optimizer, handles
    finally:
        for handle in handles:
            handle.remove()


def prepare(problem: Problem, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """What a loop does between two steps; a gradient that is there before the first one stays."""
    if step:
        optimizer.zero_grad()
        if problem.between is not None:
            problem.between(model, optimizer)


def plain_step(model: nn.Module, optimizer: Optimizer, loss: nn.Module, batch: Batch) -> Tensor:
    """``phi(model(x), y).backward(); optimizer.step()``."""
    value = loss(model(batch[0]), batch[1])
    value.backward()
    optimizer.step()
    return value.detach()


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def loop(problem: Problem, losses: Sequence[nn.Module]) -> list[Tensor]:
    """θ after one plain step with each of the losses."""
    with started(problem) as (model, optimizer, _):
        for i, loss in enumerate(losses):
            prepare(problem, model, optimizer, i)
            plain_step(model, optimizer, loss, problem.batches(i))
        return weights(model)


def plain_run(problem: Problem, steps: int) -> tuple[Plain, list[Tensor | None]]:
    """The last of ``steps`` steps of the plain loop, and v behind it."""
    phi = problem.phi()
    with started(problem) as (model, optimizer, handles):
        for i in range(steps):
            prepare(problem, model, optimizer, i)
            before = None if any(map(is_lazy, model.parameters())) else weights(model)
            value = plain_step(model, optimizer, phi, problem.batches(i))
        after = state_of(model, optimizer, phi, problem)
        ways = [(a - b).abs().max().item() for a, b in zip(weights(model), before or [], strict=False) if a.numel()]
        for handle in handles:
            handle.remove()
        handles.clear()
        model.zero_grad()
        inputs, targets = problem.batches(steps)
        meta = task_loss(problem)(model(inputs), targets)
        meta.backward()
        gradient = [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
    return Plain(after, max(ways, default=1.0), value, meta.detach()), gradient


def shifted(phi: nn.Module, direction: Sequence[Tensor], by: float) -> nn.Module:
    """φ + by · direction."""
    moved = copy.deepcopy(phi)
    with torch.no_grad():
        for parameter, along in zip(moved.parameters(), direction, strict=True):
            parameter.add_(along, alpha=by)
    return moved


def romberg(values: Sequence[float]) -> tuple[float, float]:
    """Central differences at h, h/2, h/4, ... extrapolated, and the size of the last correction."""
    row, correction = list(values), 0.0
    for order in range(1, len(values)):
        finer = [(4**order * b - a) / (4**order - 1) for a, b in zip(row, row[1:], strict=False)]
        correction = abs(finer[-1] - row[-1])
        row = finer
    return row[0], correction


def slope(problem: Problem, steps: int, v: Sequence[Tensor | None], direction: Sequence[Tensor]) -> float:
    """Equation (1) for the last of ``steps`` steps."""
    phi, tries = problem.phi(), []
    for h in STEPS_OF_PHI:
        values = []
        for level in range(3):
            width = h / 2**level
            ahead, behind = (
                loop(problem, [phi] * (steps - 1) + [shifted(phi, direction, sign * width)]) for sign in (1, -1)
            )
            products = [
                (g.conj() * (a - b)).real.sum() for g, a, b in zip(v, ahead, behind, strict=True) if g is not None
            ]
            values.append(float(sum(products)) / (2 * width))
        value, error = romberg(values)
        if error <= problem.tolerance / 50 * abs(value):
            return value
        tries.append(f"{value:.9e} at {h:.0e}, wrong by {error:.0e}")
    raise InaccurateError(f"the reference is not accurate enough: {'; '.join(tries)}")


def reference(problem: Problem) -> list[Plain]:
    """Every judged step of the plain loop with the derivatives behind it."""
    found = []
    with warnings.catch_warnings(action="ignore"):
        for steps in range(1, problem.steps + 1):
            plain, v = plain_run(problem, steps)
            generator = torch.Generator().manual_seed(11 + steps)
            for _ in range(problem.directions):
                drawn = [
                    torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.requires_grad
                    for p in problem.phi().parameters()
                ]
                length = torch.stack([d.norm() for d in drawn]).norm()
                direction = [d / length for d in drawn]
                plain.slopes.append((direction, slope(problem, steps, v, direction)))
            found.append(plain)
    return found


def state_of(model: nn.Module, optimizer: Optimizer, phi: nn.Module, problem: Problem) -> dict[str, Any]:
    """Everything that a refusal must leave alone, by name; tensors are copied, objects that must stay are kept."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    modules = [*model.modules(), *phi.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "Parameter objects": [(name, Same(p)) for name, p in parameters.items()],
        "θ": {name: copied(p) for name, p in parameters.items()},
        "requires_grad": [p.requires_grad for p in [*parameters.values(), *phi.parameters()]],
        ".grad": [copied(p.grad) for p in parameters.values()],
        "buffers": {name: copied(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "optimizer's state": [copied(dict(optimizer.state.get(p, {}))) for p in held],
        "optimizer's settings": [
            {name: copied(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "optimizer's parameters": [Same(p) for p in held],
        "modes": [module.training for module in modules],
        "random state": torch.get_rng_state(),
        "φ": [(Same(p), copied(p), copied(p.grad)) for p in phi.parameters()],
        "hooks": [[len(getattr(module, name)) for name in hooks] for module in modules]
        + [len(p._backward_hooks or ()) for p in parameters.values()],
        "what is observed": copied(problem.observe(model, optimizer)) if problem.observe else None,
    }  # fmt: skip


@dataclass(frozen=True)
class Same:
    """An object that must stay the very one."""

    it: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "not initialised" if is_lazy(value) else value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(entry) for name, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list | tuple) else value


def difference(found: Any, wanted: Any, allowed: float | None = None, relative: float = 1e-14) -> str:
    """Where two values of :func:`copied` differ, in words.

    They must be equal bit for bit; or up to ``allowed``, and ``relative`` times a tensor's largest entry.
    """
    if isinstance(wanted, Tensor) and isinstance(found, Tensor):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return f"{found.dtype} {tuple(found.shape)} for {wanted.dtype} {tuple(wanted.shape)}"
        if torch.equal(found, wanted) or (found.isnan() == wanted.isnan()).all() and not wanted.numel():
            return ""
        if not (wanted.is_floating_point() or wanted.is_complex()):
            return "other numbers"
        gap = (found - wanted).abs().max().item()
        close = allowed is not None and gap <= allowed + relative * wanted.abs().max().item()
        return "" if close else f"off by {gap:.1e}"
    if isinstance(wanted, dict) and isinstance(found, dict):
        if found.keys() != wanted.keys():
            return f"entries {sorted(map(str, found))} for {sorted(map(str, wanted))}"
        pairs = [(name, found[name], wanted[name]) for name in wanted]
    elif isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        if len(found) != len(wanted):
            return f"{len(found)} entries for {len(wanted)}"
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=True))]
    elif isinstance(wanted, float) and isinstance(found, float) and allowed is not None:
        return "" if abs(found - wanted) <= allowed * max(1.0, abs(wanted)) else f"{found} for {wanted}"
    else:
        return "" if type(found) is type(wanted) and found == wanted else f"{_short(found)} for {_short(wanted)}"
    return next((f"{name}: {text}" for name, a, b in pairs if (text := difference(a, b, allowed, relative))), "")


def _short(value: Any) -> str:
    return f"another {type(value.it).__name__}" if isinstance(value, Same) else str(value)[:40]


def judge(
    problem: Problem,
    engine: str,
    plain: Sequence[Plain | None] | None = None,
    learner: Callable[..., Any] = OnlineLoss,
    **options: Any,
) -> Verdict:
    """Take the steps with an engine and compare; ``plain`` is :func:`reference` of the problem.

    A None in it is a step to be refused, because there is no plain loop, or no derivative of it.
    """
    plain = reference(problem) if plain is None else plain
    phi, online = problem.phi(), None
    with warnings.catch_warnings(action="ignore"), started(problem) as (model, optimizer, _):
        meta_batch = problem.batches(0)
        for i, wanted in enumerate(plain):
            batch, meta_batch = meta_batch, problem.batches(i + 1)
            prepare(problem, model, optimizer, i)
            before = state_of(model, optimizer, phi, problem)
            try:
                if online is None:
                    online = learner(model, phi, optimizer, engine=engine, **options)
                result = online.meta_gradient([batch], meta_batch)
            except Exception as error:  # noqa: BLE001
                return _refusal(error, i, before, state_of(model, optimizer, phi, problem))
            if text := _faults(result, state_of(model, optimizer, phi, problem), before, wanted, problem.tolerance):
                return Verdict("fault", f"step {i + 1}: {text}")
    return Verdict("right")


def _refusal(error: Exception, step: int, before: dict[str, Any], after: dict[str, Any]) -> Verdict:
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not isinstance(error, REFUSALS) or not str(error).strip():
        return Verdict("fault", f"step {step + 1}: not a refusal with a message: {message}")
    changed = [f"{name} ({text})" for name in before if (text := difference(after[name], before[name]))]
    if changed:
        return Verdict("fault", f"step {step + 1}: changed {', '.join(changed)} and then raised {message}")
    return Verdict("refused", message)


def _faults(result: Any, after: dict[str, Any], before: dict[str, Any], wanted: Plain | None, tolerance: float) -> str:
    """What is wrong with a step that was taken."""
    if wanted is None:
        return "a step was taken, and nothing can tell whether it is right"
    for name in ("Parameter objects", "requires_grad", "optimizer's parameters", "modes", "φ", "hooks"):
        if text := difference(after[name], before[name]):
            return f"{name} changed ({text})"
    if text := difference(after["θ"], wanted.after["θ"], tolerance * wanted.moved):
        return f"θ is not the plain loop's, in a step of {wanted.moved:.1e} ({text})"
    for name in ("buffers", "optimizer's state", "what is observed"):
        if text := difference(after[name], wanted.after[name], 1e-9, 0.1 * tolerance):
            return f"{name} not the plain loop's ({text})"
    for name in ("random state", "optimizer's settings"):
        if text := difference(after[name], wanted.after[name]):
            return f"{name} not the plain loop's ({text})"
    if text := difference(
        [result.training_loss.detach(), result.meta_loss.detach()],
        [wanted.training_loss, wanted.meta_loss],
        tolerance * max(abs(wanted.training_loss.item()), abs(wanted.meta_loss.item())),
    ):
        return f"losses not the plain loop's ({text})"
    gradient = result.meta_gradient
    shapes = [p.shape for _, p, _ in after["φ"]]
    if [g.shape for g in gradient] != shapes or not all(torch.isfinite(g).all() for g in gradient):
        return "the meta-gradient has other shapes, or is not finite"
    if any(g.requires_grad for g in gradient):
        return "the meta-gradient carries a graph"
    slopes = [
        (sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item(), value)
        for direction, value in wanted.slopes
    ]
    largest = max(abs(value) for _, value in slopes)
    if not largest:
        return "" if not any(found for found, _ in slopes) else "the meta-gradient should be zero"
    error = max(abs(found - value) for found, value in slopes) / largest
    if error <= tolerance:
        return ""
    return f"meta-gradient along a direction {slopes[0][0]:+.6e}, plain loop {slopes[0][1]:+.6e} (relative {error:.0e})"


def judge_all(
    problem: Problem,
    counts: Counter,
    label: str,
    engines: Sequence[str] = ENGINES,
    plain: Sequence[Plain | None] | None = None,
) -> dict[str, Verdict]:
    """The verdict on each engine; right, refused and faults are counted under ``label``."""
    plain = reference(problem) if plain is None else plain
    verdicts = {engine: judge(problem, engine, plain) for engine in engines}
    for verdict in verdicts.values():
        counts[f"{label}: {verdict.kind}"] += 1
    return verdicts


Refusals = dict[str, tuple[str, str]]
"""Case -> the engines that refuse it, and a part of what each says."""


def check(case: str, verdicts: dict[str, Verdict], expected: tuple[str, str] | None) -> None:
    """Raise ``AssertionError`` if there is a fault, or other refusals than expected."""
    said = "\n".join(f"  {engine}: {verdict}" for engine, verdict in verdicts.items())
    assert all(verdict.kind != "fault" for verdict in verdicts.values()), f"{case}\n{said}"
    engines, part = expected or ("", "")
    texts = {engine: verdict.text for engine, verdict in verdicts.items() if verdict.kind == "refused"}
    assert " ".join(texts) == engines, f"{case} is to be refused by {engines or 'none'}, but\n{said}"
    assert all(part in text for text in texts.values()), f"{case} is to be refused with {part!r}, but\n{said}"
