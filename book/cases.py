"""What people bring to a training loop, each tried with every exact engine, for the table of *Run it on your own data*.

A case is *right* if θ' is that of the plain loop ``loss(model(x), y).backward(); optimizer.step()``, and so is the
derivative of the task loss there, along a random direction d of φ: a central difference in float64 of ⟨v, θ'(φ + h d)⟩,
with v the gradient of the task loss at θ'. It is *refused* if an error is raised and θ, the optimizer and φ are as they
were.
"""

from __future__ import annotations

import copy
import html
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from adalfl_lite import LossNetwork, OnlineLoss

ENGINES = ("forward", "shared", "unrolled")
TOLERANCE = 1e-5
CLIP = 1e-4
WIDTHS = ("min-width: 7em", "min-width: 6em", "min-width: 9em; overflow-wrap: anywhere")
"""Of the table's columns, on a phone."""


class Layers(nn.Module):
    """Two linear layers, and a function of (model, hidden) between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **more: nn.Module):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(8, 4), between
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4)."""
        return self.b(self.between(self, torch.tanh(self.a(x))))


class Cube(Function):
    """x³ by hand, backward only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x³."""
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """3 x² g."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeOnce(Cube):
    """The same; its backward pass has no derivative itself."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """3 x² g."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Clipping(torch.optim.SGD):
    """Clips before it steps."""

    def step(self, closure: Any = None) -> Any:
        """A clipped step."""
        clip(self)
        return super().step(closure)


def clip(optimizer: Optimizer, *_: Any) -> None:
    """What loops do between ``backward()`` and ``step()``."""
    clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)


def plain() -> nn.Module:
    """A small model."""
    return Layers(lambda model, h: h)


def tied() -> nn.Module:
    """Two layers with one weight."""
    model = Layers(lambda m, h: m.second(torch.tanh(m.first(h))), first=nn.Linear(8, 8), second=nn.Linear(8, 8))
    model.second.weight = model.first.weight
    return model


def held(model: nn.Module, h: Tensor) -> Tensor:
    """Divided by a scale that is a constant."""
    with torch.no_grad():
        scale = h.abs().mean()
    return h / scale


def hooked(model: nn.Module, h: Tensor) -> Tensor:
    """With half of its gradient."""
    h.register_hook(lambda g: 0.5 * g)
    return h


class Sequences(nn.Module):
    """A layer over sequences of three parts, (B, 3, 2) -> (B, 3, 8)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(2, 8), layer, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4)."""
        h = self.layer(self.embed(x.view(-1, 3, 2)))
        return self.head((h[0] if isinstance(h, tuple) else h).mean(1))


class Spectrum(nn.Module):
    """Complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, dtype=torch.complex128)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4)."""
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6))


def words(**options: Any) -> Callable[[], nn.Module]:
    """A model of three tokens."""
    return lambda: nn.Sequential(nn.Embedding(20, 4, **options), nn.Flatten(), nn.Linear(12, 4))


def rows(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (12, 6) and labels (12,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 6, generator=generator).double(), torch.randint(4, (12,), generator=generator)


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Token ids (12, 3) and labels (12,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, (12, 3), generator=generator), torch.randint(4, (12,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    """The optimizer, where nothing depends on it."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


@dataclass(frozen=True)
class Case:
    """A model, its optimizer, and what a loop does besides."""

    make: Callable[[], nn.Module] = plain
    optimizer: Callable[[nn.Module], Optimizer] = sgd
    batches: Callable[[int], tuple[Tensor, Tensor]] = rows
    attach: Callable[[nn.Module, Optimizer], Any] = lambda model, optimizer: None
    """Done to the model and the optimizer before the step."""
    before_step: Callable[[Optimizer], Any] = lambda optimizer: None
    """What the plain loop does between ``backward()`` and ``step()``."""
    parts: tuple[int, ...] = ()
    """Sizes of micro batches."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of OnlineLoss, for what is in ``before_step``."""


def warm_up(model: nn.Module, optimizer: Optimizer) -> None:
    """Two steps, so that Adam's moments are not empty: its first step is hardly smooth."""
    for seed in (7, 8):
        inputs, targets = rows(seed)
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def normalised() -> nn.Module:
    """BatchNorm and dropout."""
    return Layers(lambda m, h: m.dropout(m.norm(h)), norm=nn.BatchNorm1d(8), dropout=nn.Dropout(0.4))


CASES = {
    "a layer used twice": Case(lambda: Layers(lambda m, h: m.c(torch.tanh(m.c(h))), c=nn.Linear(8, 8))),
    "tied weights": Case(tied),
    "BatchNorm and dropout, in train mode": Case(normalised),
    "a Transformer encoder": Case(lambda: Sequences(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True))),
    "an LSTM": Case(lambda: Sequences(nn.LSTM(8, 8, batch_first=True))),
    "complex weights, with Adam": Case(Spectrum, lambda m: torch.optim.Adam(m.parameters(), lr=0.01), attach=warm_up),
    "a bag of embeddings": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(20, 8, mode="sum"), nn.Linear(8, 4)), batches=tokens
    ),
    "a constant under `torch.no_grad()`": Case(lambda: Layers(held)),
    "straight-through rounding by `detach`": Case(
        lambda: Layers(lambda m, h: h + (torch.round(4 * h) / 4 - h).detach())
    ),
    "micro batches": Case(parts=(5, 3, 4)),
    "clipping, `clip_gradient_norm=`": Case(before_step=clip, options={"clip_gradient_norm": CLIP}),
    "a checkpoint, not reentrant": Case(lambda: Layers(lambda m, h: checkpoint(torch.tanh, h, use_reentrant=False))),
    "a Function without a forward derivative": Case(lambda: Layers(lambda m, h: Cube.apply(h))),
    "a Function that can be differentiated once": Case(lambda: Layers(lambda m, h: CubeOnce.apply(h))),
    "a gradient hook on an activation": Case(lambda: Layers(hooked)),
    "a gradient hook on a parameter": Case(attach=lambda m, o: m.a.weight.register_hook(lambda g: 0.5 * g)),
    "a step hook on the optimizer": Case(attach=lambda m, o: o.register_step_pre_hook(clip)),
    "an optimizer with a `step` of its own": Case(optimizer=lambda m: Clipping(m.parameters(), lr=0.1)),
    "a `.grad` that is there already": Case(attach=lambda m, o: m(rows(9)[0]).sum().backward()),
    "an embedding with `max_norm`": Case(words(max_norm=1.0), batches=tokens),
    "an embedding with sparse gradients": Case(words(sparse=True), batches=tokens),
    "a lazy layer": Case(lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4))),
}


def started(case: Case) -> tuple[nn.Module, Optimizer]:
    """The same to the last bit each time."""
    torch.manual_seed(0)
    model = case.make().double()
    optimizer = case.optimizer(model)
    case.attach(model, optimizer)
    return model, optimizer


def loss_network() -> LossNetwork:
    """M_φ; smooth where the differences are taken."""
    return LossNetwork.classification(beta=2.0, generator=torch.Generator().manual_seed(1)).double()


def plain_step(case: Case, direction: list[Tensor], h: float) -> nn.Module:
    """The model after one step of the plain loop with the loss φ + h d."""
    (model, optimizer), phi = started(case), loss_network()
    with torch.no_grad():
        for p, d in zip(phi.parameters(), direction, strict=True):
            p.add_(d, alpha=h)
    inputs, targets = case.batches(0)
    sizes = case.parts or (len(targets),)
    for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True):
        (phi(model(x), y) * (len(y) / len(targets))).backward()
    case.before_step(optimizer)
    optimizer.step()
    return model


def model_is(case: Case, model: nn.Module, direction: list[Tensor]) -> bool:
    """Whether θ' is the plain loop's."""
    pairs = zip(model.parameters(), plain_step(case, direction, 0.0).parameters(), strict=True)
    return all(torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12) for ours, theirs in pairs)


def slope(case: Case, direction: list[Tensor], h: float = 1e-3) -> float:
    """d/dh ⟨v, θ'(φ + h d)⟩ of the plain loop; Richardson's two differences."""
    model, (x, y) = plain_step(case, direction, 0.0), case.batches(1)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    v = [p.grad for p in model.parameters()]

    def difference(h: float) -> float:
        ahead, behind = ([p.detach() for p in plain_step(case, direction, s * h).parameters()] for s in (1, -1))
        ways = zip(v, ahead, behind, strict=True)
        return sum((g.conj() * (a - b)).real.sum().item() for g, a, b in ways if g is not None) / (2 * h)

    return (4 * difference(h / 2) - difference(h)) / 3


def state(*modules: nn.Module) -> list[Tensor]:
    """Copies of all that a refused step must leave alone, but what has no values yet."""
    values = [value for module in modules for value in module.state_dict().values()]
    return [value.clone() for value in values if not nn.parameter.is_lazy(value)]


def verdict(case: Case, engine: str) -> str:
    """Whether a step is right: "right", or the message of a refusal; ``AssertionError`` where it is neither."""
    (model, optimizer), phi = started(case), loss_network()
    before, of_optimizer = state(model, phi), copy.deepcopy(optimizer.state_dict())
    batch, meta_batch = case.batches(0), case.batches(1)
    given: Any = list(zip(*(tensor.split(case.parts) for tensor in batch), strict=True)) if case.parts else batch
    try:
        online = OnlineLoss(model, phi, optimizer, engine=engine, **case.options)
        step = online.meta_gradient([given], meta_batch)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert all(map(torch.equal, before, state(model, phi))) and optimizer.state_dict() == of_optimizer
        return str(error)
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).double() for p in phi.parameters()]
    found = sum((g * d).sum().item() for g, d in zip(step.meta_gradient, direction, strict=True))
    wanted = slope(case, direction)
    assert model_is(case, model, direction), f"{engine}: θ is not the plain loop's"
    assert abs(found - wanted) < TOLERANCE * abs(wanted), f"{engine}: {found} for {wanted}"
    return "right"


def verdicts() -> dict[str, dict[str, str]]:
    """Case -> engine -> verdict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: {engine: verdict(case, engine) for engine in ENGINES} for name, case in CASES.items()}


def parted(message: str) -> tuple[str, str]:
    """The first clause of a message, and its remedy."""
    message = re.sub(r"^engine='\S+' cannot serve this model: | of shape \(.*?\)", "", message)
    what, _, remedy = message.rpartition("; ") if "; engine=" in message else message.partition("; ")
    return re.split(r": |; | \(along", what)[0], remedy


def table() -> str:
    """The verdicts in HTML: what is brought, the engines that are right, and what the others say."""
    lines = []
    for name, found in verdicts().items():
        right = [engine for engine, text in found.items() if text == "right"]
        said = [parted(text) for text in found.values() if text != "right"]
        reasons, remedies = (sorted(set(column)) for column in zip(*said, strict=True)) if said else ([], [])
        refused = "; ".join([*reasons, *(f"*{remedy}*" for remedy in remedies)])
        lines.append([name, "all" if len(right) == len(ENGINES) else ", ".join(right) or "none", refused])
    return in_html(["what you bring", "right with", "refused, and *what to do*"], lines)


def in_html(header: list[str], lines: list[list[str]]) -> str:
    """A table with its cells to the left; code and emphasis as in Markdown."""

    def cell(tag: str, text: str, width: str) -> str:
        text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))
        text = re.sub(r"[*](.+?)[*]", r"<em>\1</em>", text)
        return f'<{tag} style="text-align: left; padding: 0.3em 0.5em; {width}">{text}</{tag}>'

    def row(tag: str, texts: list[str]) -> str:
        return f"<tr>{''.join(cell(tag, *pair) for pair in zip(texts, WIDTHS, strict=True))}</tr>"

    head, rows = row("th", header), "".join(row("td", line) for line in lines)
    return f'<table class="table" style="font-size: 0.8em"><thead>{head}</thead><tbody>{rows}</tbody></table>'
