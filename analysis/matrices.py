"""The Hessian and the Gauss-Newton matrix as linear operators: how :mod:`analysis.curvature` multiplies with them.

Products are taken by two reverse passes each, over several vectors at once:

- ∇²L·v = ∇⟨∇L, v⟩;
- for the Gauss-Newton matrix, J v by :mod:`analysis.derivatives`, then ∇²_f ℓ, then Jᵀ by a backward pass.

(The ``jvp`` of ``jacrev`` that curvlinops takes, and ``torch.func.hessian``, are silently wrong in torch 2.15 where the
scales of LayerNorm, InstanceNorm, or BatchNorm in train mode are parameters; and forward mode looks into
``torch.no_grad``.) Before any use each batch is tried with random vectors: a Hessian must be symmetric, and J must be
the transpose of what a backward pass applies. (What a custom autograd.Function computes outside of torch in its own
backward pass is a constant to the second one, and no check here sees that.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from analysis.derivatives import (
    TORCHSCRIPT,
    backward,
    backward_columns,
    check_adjoint,
    check_equal,
    explained,
    inner,
)
from analysis.inputs import (
    Data,
    Loss,
    as_batches,
    call,
    check_value,
    evaluation,
    finite_scalar,
    one_tensor,
    plain_kernels,
    replaced,
    still,
    trainable,
)

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", *TORCHSCRIPT)
    from curvlinops import GGNLinearOperator, HessianLinearOperator

MATRICES = ("hessian", "ggn")
LOW_PRECISION = (torch.bfloat16, torch.float16)
NOT_SYMMETRIC = (
    "the second derivative of this loss is not symmetric: ⟨v, Hw⟩ = {:.6g}, but ⟨w, Hv⟩ = {:.6g}. That happens with "
    "scale_grad_by_freq=True in an embedding, with hooks that change gradients, or in a custom autograd.Function; take "
    "that out, or set requires_grad=False on the parameters before it to leave them out"
)


class Problem:
    """L(θ) on the batches at hand: a model in eval mode with its trainable parameters as leaves, checked.

    Attributes:
        model: f_θ, the user's own.
        loss: (prediction, target) -> scalar.
        leaves: θ, the trainable parameters by name, detached; of a model in half precision in float32.
        rest: the frozen parameters and the buffers, likewise.
        batches: on the device of the model.
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Data):
        self.model, self.loss = model, still(loss)
        moving = trainable(model)
        for name, parameter in moving.items():
            if not parameter.is_floating_point():
                raise ValueError(f"curvature needs real parameters, {name!r} is {parameter.dtype}; freeze it")
        self._low = any(parameter.dtype in LOW_PRECISION for parameter in moving.values())
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        values = {name: self._wide(tensor.detach()) for name, tensor in own.items()}
        self.leaves = {name: values[name].requires_grad_() for name in moving}
        self.rest = {name: value for name, value in values.items() if name not in moving}
        device = next(iter(moving.values())).device
        self.batches = [(self._wide(x.to(device)), self._wide(y.to(device))) for x, y in as_batches(data)]
        for position, (x, y) in enumerate(self.batches):
            with torch.no_grad():
                finite_scalar(self._first_value(x, y), f"batch {position}: the loss")

    def _wide(self, tensor: Tensor) -> Tensor:
        # second derivatives in 8 or 11 bits are noise: a model in half precision is run in float32
        return tensor.float() if self._low and tensor.dtype in LOW_PRECISION else tensor.detach()

    def _first_value(self, x: Tensor, y: Tensor) -> Tensor:
        try:
            return self.loss(call(self.model, self.leaves | self.rest, x), y)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self._low:
                raise
            raise ValueError(
                "curvature of a model in half precision is computed in float32, and this one cannot be run so "
                f"({error}); pass a float32 copy, model.float()"
            ) from error

    @contextmanager
    def open(self) -> Iterator[None]:
        """A block with θ in the model's slots and gradients enabled; differentiate within the block."""
        with replaced(self.model, self.leaves | self.rest), torch.enable_grad(), explained():
            yield

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """L on a batch with its graph, within :meth:`open`."""
        return check_value(self.loss(self.model(x.clone()), y))


@contextmanager
def prepared(model: nn.Module, loss: Loss, data: Data, batchnorm: str) -> Iterator[Problem]:
    """The problem of a model in eval mode; model and loss are left as they were."""
    check_choice("batchnorm", batchnorm, ("eval", "train"))
    with evaluation(model, loss, batch_statistics=batchnorm == "train"), plain_kernels(model):
        yield Problem(model, loss, data)


class _Mean(nn.Module):
    """Tells curvlinops to weight batches by their size."""

    reduction = "mean"


class _Products:
    """Products with the matrix of one batch. The graph of a single batch is kept from one product to the next."""

    problem: Problem
    kept: tuple[Any, ...] | None = None

    def _graph(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        # Lanczos takes hundreds of products with one matrix: the first backward pass is the same for all of them. With
        # several batches only one graph is in memory at a time, and each product builds it anew.
        if self.kept is None or len(self.problem.batches) > 1:
            self.kept = None
            graph = self._build(x, y)
            if len(self.problem.batches) > 1:
                return graph
            self.kept = graph
        return self.kept

    def _matmat_batch(self, X: Tensor, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        with self.problem.open():
            columns = [part.movedim(-1, 0) for part in M]  # curvlinops stacks vectors behind, autograd in front
            return [part.movedim(0, -1) for part in self._product(self._graph(X, y), X, columns)]

    def _random(self, count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)  # its own, so that the check draws from nobody's random numbers
        leaves = self.problem.leaves.values()
        return [torch.randn(count, *p.shape, generator=generator, dtype=torch.float64).to(p.detach()) for p in leaves]

    def _build(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError

    def _product(self, graph: tuple[Any, ...], x: Tensor, columns: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError


class _Hessian(_Products, HessianLinearOperator):
    def _build(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        value, leaves = self.problem.value(x, y), list(self.problem.leaves.values())
        return (backward([value], leaves, [torch.ones_like(value)], graph=True),)  # ∇L, with its graph

    def _product(self, graph: tuple[Any, ...], x: Tensor, columns: list[Tensor]) -> list[Tensor]:
        return backward_columns(graph[0], list(self.problem.leaves.values()), columns)  # ∇⟨∇L, v⟩ = ∇²L v

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raise ``NotImplementedError`` unless ⟨v, Hw⟩ = ⟨w, Hv⟩."""
        columns = self._random(2)
        with self.problem.open():
            products = self._product(self._graph(x, y), x, columns)
        v, w = ([column[k] for column in columns] for k in (0, 1))
        hv, hw = ([product[k].detach() for product in products] for k in (0, 1))
        first, second = inner(v, hw), inner(w, hv)
        # the size of the terms, ‖v‖ ‖Hw‖ + ‖w‖ ‖Hv‖: the two numbers themselves may be almost zero
        scale = (inner(v, v) * inner(hw, hw)).sqrt() + (inner(w, w) * inner(hv, hv)).sqrt()
        check_equal(first, second, scale, hv[0], NOT_SYMMETRIC)


class _GaussNewton(_Products, GGNLinearOperator):
    forward_mode = False

    def _build(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        leaves = list(self.problem.leaves.values())
        # Two graphs that meet at f, the model's and the loss's: the model's own curvature has no part in Jᵀ (∇²_f ℓ) J.
        prediction = one_tensor(self.problem.model(x.clone()))
        leaf = prediction.detach().requires_grad_()
        value = check_value(self.problem.loss(leaf, y))
        (slope,) = backward([value], [leaf], [torch.ones_like(value)], graph=True)  # ∇_f ℓ, differentiable along f
        # Any s will do for J w = ∇_s ⟨Jᵀs, w⟩; ∇_f ℓ has the right shape and size for the check.
        cotangent = slope.detach().requires_grad_()
        pulled = backward([prediction], leaves, [cotangent], graph=True)  # Jᵀs
        return prediction, leaf, slope, cotangent, pulled

    def _parts(self, graph: tuple[Any, ...], x: Tensor, columns: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """J v, (∇²_f ℓ) J v and Jᵀ (∇²_f ℓ) J v."""
        prediction, leaf, slope, cotangent, pulled = graph
        moved = self._tangents(pulled, cotangent, x, columns)  # J v
        (bent,) = backward_columns([slope], [leaf], [moved])  # (∇²_f ℓ) J v = ∇_f ⟨∇_f ℓ, J v⟩
        # Jᵀ of that, by a plain backward pass
        return moved, bent, backward_columns([prediction], list(self.problem.leaves.values()), [bent])

    def _tangents(self, pulled: list[Tensor], cotangent: Tensor, x: Tensor, columns: list[Tensor]) -> Tensor:
        if not self.forward_mode:
            return backward_columns(pulled, [cotangent], columns)[0]  # ∇_s ⟨Jᵀs, v⟩ = J v
        names = list(self.problem.leaves)
        values = {name: leaf.detach() for name, leaf in self.problem.leaves.items()}

        def forward(moved: dict[str, Tensor]) -> Tensor:
            return call(self.problem.model, self.problem.rest | moved, x)

        def along(*direction: Tensor) -> Tensor:
            return jvp(forward, (values,), (dict(zip(names, direction, strict=True)),))[1]

        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", *TORCHSCRIPT)
            return vmap(along, randomness="same")(*columns)

    def _product(self, graph: tuple[Any, ...], x: Tensor, columns: list[Tensor]) -> list[Tensor]:
        return self._parts(graph, x, columns)[2]

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raise ``NotImplementedError`` unless Jᵀ is the transpose of J; take forward mode where nothing else works."""
        columns = self._random(1)
        with self.problem.open():
            graph = self._graph(x, y)
            try:
                moved, bent, product = self._parts(graph, x, columns)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self.forward_mode = True
                moved, bent, product = self._parts(graph, x, columns)
        w = [column[0] for column in columns]
        check_adjoint([g.detach() for g in graph[4]], w, graph[3].detach(), moved[0])  # ⟨Jᵀs, w⟩ = ⟨s, J w⟩
        # the same of the last factor, with s = (∇²_f ℓ) J w
        check_adjoint([part[0] for part in product], w, bent[0], moved[0])


@contextmanager
def operator(
    model: nn.Module, loss: Loss, data: Data, matrix: str, batchnorm: str, seed: int
) -> Iterator[tuple[_Hessian | _GaussNewton, dict[str, Tensor]]]:
    """The linear operator of a matrix, and the parameters it is over; torch's random state is seeded meanwhile.

    The one place that knows how curvlinops 3 wants a problem: its parameters as a list, and what has a ``reduction``.
    """
    check_choice("matrix", matrix, MATRICES)
    with prepared(model, loss, data, batchnorm) as problem:
        made = (_Hessian if matrix == "hessian" else _GaussNewton)(
            model,
            _Mean(),
            list(problem.leaves.values()),
            problem.batches,
            check_deterministic=False,  # it is: in eval mode, over a list of batches
            num_data=sum(len(x) for x, _ in problem.batches),
        )
        made.problem = problem
        for x, y in problem.batches:
            made.check(x, y)
        cuda = made.device.type == "cuda"
        generator = torch.cuda.default_generators[made.device.index] if cuda else torch.default_generator
        generator.manual_seed(seed)
        with torch.no_grad():
            yield made, {name: leaf.detach() for name, leaf in problem.leaves.items()}


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
