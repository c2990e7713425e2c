"""S models, and S loss networks, as one function of stacked tensors, and Algorithm 2's step for all of them.

Small models leave a processor idle: a step on a batch of digits is a hundred kernels of a few microseconds each. Here
θ, φ, both optimizers' states and the batches carry a leading dimension S, and one step advances every seed:

- the models by ``torch.func.vmap``, their tangents u = J_f w by ``torch.func.jvp`` around it;
- the loss networks by :mod:`adalfl_lite.engines.closed_form`, which takes stacked weights, so ∂M_φ/∂f needs no
  backward pass;
- the optimizers as they are: SGD, Adam and AdamW treat every entry alike, and do not mind a stacked tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, stack_module_state, vmap
from torch.optim import Optimizer

from adalfl_lite.engines.closed_form import Along, derivatives, in_closed_form
from adalfl_lite.engines.steps import apply_gradients, check_model
from adalfl_lite.engines.tangents import check_agreement, inner_product, tolerance_of
from adalfl_lite.engines.updates import RULES, changes_gradients, check_no_hooks, rule_of, update_pullback
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.passes import Undo, differentiable_kernels, replaced, unmarked


class Stack:
    """S models as one function of stacked parameters and buffers."""

    def __init__(self, models: Sequence[nn.Module]):
        self.models = list(models)
        self.model = models[0]
        parameters, self.buffers = stack_module_state(self.models)
        self.parameters = list(parameters.values())
        self.like_alone = False
        """Whether a step has shown that a member of the stack is what the model is alone."""

    def __call__(self, parameters: Sequence[Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """(S, B, C) for inputs (S, B, ...); ``buffers`` are updated in place, as in train mode."""
        # one model's code serves all: within vmap its slots hold row after row of the stack
        own = list(self.model.parameters()), [dict(self.model.named_buffers())[name] for name in buffers]

        def one(theta: list[Tensor], state: list[Tensor], x: Tensor) -> Tensor:
            pairs = zip((*own[0], *own[1]), (*theta, *state), strict=True)
            with replaced(self.model, {id(tensor): new for tensor, new in pairs}):
                return self.model(x)

        # train mode: evaluation is done model by model, on what write_back puts there
        with unmarked(self.model):
            self.model.train()
            return vmap(one)(list(parameters), list(buffers.values()), inputs)

    def state_dict(self) -> dict:
        """θ and the buffers, stacked."""
        return {"parameters": [p.detach() for p in self.parameters], "buffers": self.buffers}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Put back a state that :meth:`state_dict` of one of the same make gave."""
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name])

    @torch.no_grad()
    def replace(self, i: int, model: nn.Module) -> None:
        """Put another model in the place of the i-th."""
        for stacked, parameter in zip(self.parameters, model.parameters(), strict=True):
            stacked[i].copy_(parameter)
        # running statistics belong to the model that left, too
        for name, buffer in model.named_buffers():
            self.buffers[name][i].copy_(buffer)
        self.models[i] = model

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the S models to where the stack is."""
        for i, model in enumerate(self.models):
            for parameter, stacked in zip(model.parameters(), self.parameters, strict=True):
                parameter.copy_(stacked[i])
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name][i])


class StackedLoss:
    """S loss networks as one; ``parameters`` are φ, stacked."""

    def __init__(self, networks: Sequence[LossNetwork]):
        self.networks = networks
        stacked, _ = stack_module_state(list(networks))
        self.parameters = [parameter.detach() for parameter in stacked.values()]

    def state_dict(self) -> dict:
        """The weights of all loss networks, stacked; they are not copied."""
        return {"parameters": self.parameters}

    def load_state_dict(self, state: dict) -> None:
        """Put back a state that :meth:`state_dict` of one of the same make gave."""
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(saved)

    def derivatives(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Along]:
        """M_φ (S,), ∂M_φ/∂f (S, B, C), and the function u ↦ ∇_φ ⟨∂M_φ/∂f, u⟩ of a tangent (S, B, C)."""
        first = self.networks[0]
        output, targets = prediction, target
        if first.kind == "classification":
            output, targets = prediction.softmax(-1), F.one_hot(target, prediction.shape[-1]).to(prediction.dtype)
        return derivatives(first, self.parameters, output, targets)

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the S loss networks to where the stack is."""
        for i, network in enumerate(self.networks):
            for parameter, stacked in zip(network.parameters(), self.parameters, strict=True):
                parameter.copy_(stacked[i])


def task_losses(kind: str, prediction: Tensor, targets: Tensor) -> Tensor:
    """L_T of every seed, (S,), for predictions (S, B, C)."""
    if kind == "classification":
        return (
            F.cross_entropy(prediction.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)
        )
    return (prediction - targets).square().flatten(1).mean(1)


@dataclass(frozen=True)
class StackedStep:
    """What a step of a :class:`StackedForward` left behind, for each of the S models."""

    training_loss: Tensor
    """(S,), before the step."""
    meta_loss: Tensor | None
    """(S,), the task loss on the meta batch after the step; None without one."""
    meta_gradient: list[Tensor] | None
    """∇_φ of it, stacked as φ is; None without a meta batch or a learned loss."""

    def finite(self) -> Tensor:
        """Which models have finite losses and a finite meta-gradient: bool (S,)."""
        good = self.training_loss.isfinite()
        if self.meta_loss is not None:
            good = good & self.meta_loss.isfinite()
        for gradient in self.meta_gradient or []:
            good = good & gradient.isfinite().flatten(1).all(1)
        return good


class StackedForward:
    """:class:`~adalfl_lite.engines.forward.Forward` for S models and S loss networks at once.

    Args:
        stack: θ, stacked; each model is one of those that :func:`check_stackable` knows.
        loss: φ, stacked, which is left alone; None trains with the task loss.
        optimizer: of ``stack.parameters``.
        kind: of the task loss, "classification" or "regression".

    Raises:
        TypeError: the optimizer is not known to treat every entry alike.
    """

    def __init__(self, stack: Stack, loss: StackedLoss | None, optimizer: Optimizer, kind: str):
        check_elementwise(optimizer)
        self.stack, self.loss, self.optimizer, self.kind = stack, loss, optimizer, kind

    def __call__(
        self, batch: tuple[Tensor, Tensor], meta_batch: tuple[Tensor, Tensor] | None = None, undo: Undo | None = None
    ) -> StackedStep:
        """One step of every θ on its batch, and ∇_φ of the task loss that it leads to on the meta batch.

        Args:
            batch, meta_batch: inputs (S, B, ...) and targets (S, B) or (S, B, K); without a meta batch there is no
                meta-gradient, and with the task loss none either.
            undo: of the stack's first model and this optimizer.

        Raises:
            NotImplementedError: the models have no right forward-mode derivative as a stack; all is as it was.
        """
        stack = self.stack
        buffers = {name: buffer.clone() for name, buffer in stack.buffers.items()}
        with undo or Undo(stack.model, self.optimizer) as undo:
            try:
                return self._step(batch, meta_batch, undo.before, buffers)
            except BaseException as error:
                for name, buffer in stack.buffers.items():
                    buffer.copy_(buffers[name])
                known = isinstance(error, NotImplementedError | torch.OutOfMemoryError)
                if isinstance(error, RuntimeError) and not known:
                    raise NotImplementedError(
                        f"these models cannot pass as a stack: {error}; train them one by one"
                    ) from error
                raise

    def _step(
        self,
        batch: tuple[Tensor, Tensor],
        meta_batch: tuple[Tensor, Tensor] | None,
        before: list[Tensor],
        buffers: dict[str, Tensor],
    ) -> StackedStep:
        """The step, with copies of θ and the buffers as they are before it; equations of ``engines.forward``."""
        stack, loss = self.stack, self.loss
        prediction = stack(stack.parameters, stack.buffers, batch[0])
        if loss is None:
            training_loss = task_losses(self.kind, prediction, batch[1])
            # the models never meet, so the gradient of the sum holds that of each
            gradients = torch.autograd.grad(training_loss.sum(), stack.parameters, retain_graph=not stack.like_alone)
        else:
            training_loss, slope, derivative = loss.derivatives(prediction.detach(), batch[1])
            gradients = torch.autograd.grad(prediction, stack.parameters, slope)
        if not stack.like_alone:
            cotangent = torch.autograd.grad(training_loss.sum(), prediction)[0] if loss is None else slope
            _check_alone(stack, buffers, batch[0], prediction, cotangent, gradients)
            stack.like_alone = True
        # θ' = U(θ, g), and its derivative by g while the optimizer's state is still the old one
        pullback = update_pullback(self.optimizer, gradients) if loss is not None and meta_batch else None
        given = [g.clone() for g in gradients] if changes_gradients(self.optimizer) else gradients
        apply_gradients(self.optimizer, stack.parameters, given)
        training_loss = training_loss.detach()
        if meta_batch is None:
            return StackedStep(training_loss, None, None)

        meta_loss, v = self.gradient_after(meta_batch)
        if loss is None or pullback is None:
            return StackedStep(training_loss, meta_loss, None)
        w = pullback(v)  # equation (1)
        tangent = self._tangent(before, w, buffers, batch[0])  # equation (2)
        along, tolerance = inner_product(slope, tangent), tolerance_of(prediction.dtype)
        check_agreement(gradients, w, along, lambda: slope.norm() * tangent.norm(), tolerance=tolerance)
        return StackedStep(training_loss, meta_loss, derivative(tangent))  # equation (3)

    def gradient_after(self, meta_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """L_T (S,) at the θ that now is, and v = ∇_θ L_T; the buffers stay."""
        buffers = {name: buffer.clone() for name, buffer in self.stack.buffers.items()}
        task = task_losses(self.kind, self.stack(self.stack.parameters, buffers, meta_batch[0]), meta_batch[1])
        return task.detach(), torch.autograd.grad(task.sum(), self.stack.parameters)

    def _tangent(self, before: list[Tensor], w: Sequence[Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """u = J_f(θ) w of every model, (S, B, C), at the θ and the buffers of before the step."""

        def output(*theta: Tensor) -> Tensor:
            return self.stack(theta, {name: buffer.clone() for name, buffer in buffers.items()}, inputs)

        with torch.no_grad(), differentiable_kernels(self.stack.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # by torch itself
            return jvp(output, tuple(before), tuple(w))[1]


def _check_alone(
    stack: Stack,
    buffers: dict[str, Tensor],
    inputs: Tensor,
    prediction: Tensor,
    slope: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """Raise ``NotImplementedError`` unless the first member's pass, forward and backward, is that of a model alone.

    A model that looks at its tensors, as with ``if h.requires_grad``, may do something else within ``vmap``.
    """
    theta = [parameter[0].detach().requires_grad_() for parameter in stack.parameters]
    own = dict(stack.model.named_buffers())
    tensors = {id(parameter): t for parameter, t in zip(stack.model.parameters(), theta, strict=True)}
    tensors |= {id(own[name]): buffer[0].clone() for name, buffer in buffers.items()}
    with unmarked(stack.model), replaced(stack.model, tensors):
        stack.model.train()
        alone = stack.model(inputs[0])
        found = torch.autograd.grad(alone, theta, slope[0], allow_unused=True, materialize_grads=True)
    flat = [torch.cat([g.flatten() for g in given]) for given in (found, [gradient[0] for gradient in gradients])]
    tolerance = tolerance_of(prediction.dtype)
    if any((a - b).norm() > tolerance * (a.norm() + b.norm()) for a, b in ((alone, prediction[0]), flat)):
        raise NotImplementedError("a stack of these models is not what each is alone; train them one by one")


@torch.no_grad()
def meta_step(meta_optimizer: Optimizer, result: StackedStep) -> None:
    """Update φ with the meta-gradient of a step; a seed where that is not finite keeps its φ."""
    # a member that diverged must not touch its φ, nor the moments that Adam keeps of it
    bad = ~result.finite()
    parameters = meta_optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, result.meta_gradient or [], strict=True):
        parameter.grad = gradient
    if not bad.any():
        meta_optimizer.step()
        return
    for parameter in parameters:
        # zero, for NaN would spread through the update before the rows are put back
        parameter.grad[bad] = 0
    moments = [value for state in meta_optimizer.state.values() for value in state.values() if value.ndim]
    kept = [(tensor, tensor[bad].clone()) for tensor in (*parameters, *moments)]
    meta_optimizer.step()
    for tensor, rows in kept:
        tensor[bad] = rows


def keep_freed_memory() -> None:
    """Have glibc keep the memory of a step for the next one instead of handing it back each time."""
    # glibc raises its threshold to the largest block freed so far
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed at once, which raises the limit above which it does


def check_stackable(models: Sequence[nn.Module], losses: Sequence[nn.Module]) -> None:
    """Raise ``ValueError`` or ``TypeError``, with the reason, unless one program trains these as each would alone."""
    if len({type(model) for model in models}) > 1 or len({model.training for model in models}) > 1:
        raise ValueError("the models differ in class or mode; all must be of one architecture, and in train mode")
    for name, modules in (("models", models), ("losses", losses)):
        shapes = [
            [(key, value.shape, value.dtype, value.device) for key, value in m.state_dict().items()] for m in modules
        ]
        if any(other != shapes[0] for other in shapes[1:]):
            raise ValueError(f"the {name} differ in parameters, dtype or device; all must be of one architecture")
    for model in models:
        check_model(model)
        check_no_hooks(torch.optim.SGD(model.parameters()))
    for module in models[0].modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError("dropout draws other numbers in a stack than alone; train such models one by one")
    if any(not parameter.requires_grad for parameter in models[0].parameters()):
        raise ValueError("some parameters are frozen; train such models one by one")
    for network in losses:
        if not in_closed_form(network):
            raise TypeError(f"{type(network).__name__} cannot be stacked; give LossNetworks of known layers")
        if str(network) != str(losses[0]):
            raise ValueError("the losses differ in kind, layers or anchor; all must be of one architecture")


def check_elementwise(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` unless the optimizer is known to treat every entry alike, so that a stack suits it."""
    if rule_of(optimizer, RULES) is None:
        raise TypeError(f"{type(optimizer).__name__} is not known to treat every entry alike; use SGD, Adam or AdamW")
