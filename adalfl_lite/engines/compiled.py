"""The engine "forward" through ``torch.compile``.

A step of a small model is hundreds of kernels of microseconds, and calling them costs more than what they compute. Here
it is three functions of tensors, each compiled as a whole, with the optimizer between them as it is:

1. the training pass: f, M_φ, ∂M_φ/∂f in closed form, and from it ∇_θ M_φ;
2. the meta pass: L_T and v = ∇_θ' L_T;
3. the tangent pass: u = J_f w, and ∇_φ ⟨∂M_φ/∂f, u⟩ in closed form.

The numbers are those of the step that is not compiled, up to rounding. The first step waits for the compiler, which
takes from tens of seconds to minutes, and on a processor needs a C++ compiler. On a GPU the mode "reduce-overhead"
records the three functions as CUDA graphs. What is compiled is compiled for the sizes of the first two batches and the
modes (``train``, ``eval``) of the model's modules; a step with others, such as a smaller last batch, is not compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from adalfl_lite.checks import check_targets, unknown
from adalfl_lite.engines.base import MetaStep, Problem
from adalfl_lite.engines.closed_form import Along, derivatives, in_closed_form
from adalfl_lite.engines.forward import Forward
from adalfl_lite.engines.steps import (
    Batch,
    Batches,
    check_early,
    check_step,
    gradients_of,
    micro_batches,
    take_step,
)
from adalfl_lite.engines.tangents import check_agreement, inner_product, tolerance_of
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import output_pairs
from adalfl_lite.passes import RandomState, Undo, forward, modules_of, optimizer_parameters, replaced, slots_of


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module's pass may turn on: its mode, and other attributes that are numbers or words."""
    return {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}


class Compiled:
    """:class:`~adalfl_lite.engines.forward.Forward`, compiled; an engine that also takes a mode.

    Args:
        problem: its model draws no random numbers in its forward pass, for the tangent pass could not draw them again;
            its loss network is a :class:`~adalfl_lite.losses.LossNetwork`.
        mode: of ``torch.compile``, such as "default" or "reduce-overhead".

    Raises:
        ValueError, TypeError: the mode is unknown, or the loss network not one whose derivatives are in closed form.
    """

    def __init__(self, problem: Problem, mode: str):
        if mode not in (modes := torch._inductor.list_mode_options()):
            raise unknown("compile mode", str(mode), modes)
        if problem.process_group is not None:
            raise ValueError(f"compile={mode!r} needs engine='forward' and no process_group; leave it out")
        network = problem.loss_network
        if not (isinstance(network, LossNetwork) and in_closed_form(network)):
            raise TypeError(f"{type(network).__name__} cannot be compiled; give a LossNetwork, or no compile mode")
        self.problem, self.mode = problem, mode
        self.model, self.loss_network, self.optimizer = problem.model, network, problem.optimizer
        self.reached: list[int] = []
        self.slots: list[tuple[str, int]] = []
        """The name of each slot of the model that another tensor is put into, and its index in θ and the buffers."""
        self.outputs = 0
        self.case: tuple[list, ...] | None = None
        self._compile()

    def _compile(self) -> None:
        options: dict[str, Any] = {"mode": self.mode, "fullgraph": True, "dynamic": False}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not in older versions of torch
            options["isolate_recompiles"] = True
        self.training_pass = torch.compile(self._training_pass, **options)
        self.meta_pass = torch.compile(self._meta_pass, **options)
        self.tangent_pass = torch.compile(self._tangent_pass, **options)

    def __getstate__(self) -> dict:
        """All but the compiled functions, which belong to this object."""
        return {name: value for name, value in vars(self).items() if not name.endswith("_pass")} | {"case": None}

    def __setstate__(self, state: dict) -> None:
        """Take it up, and compile anew."""
        vars(self).update(state)
        self._compile()

    def __call__(self, batch: Batches, meta_batch: Batches, undo: Undo | None = None) -> MetaStep:
        """One step, and what it leaves behind.

        Raises:
            ValueError: a batch that does not fit, or a model that draws random numbers.
            NotImplementedError: the model's derivative is not its backward pass's.
            RuntimeError: ``torch.compile`` cannot serve this model or these batches.
        """
        with undo or Undo(self.model, self.optimizer) as undo:
            check_step(self.model, self.optimizer)
            parts = [*micro_batches(batch), *micro_batches(meta_batch)]
            parameters = optimizer_parameters(self.optimizer)
            trained = [(id(parameter), parameter.requires_grad) for parameter in parameters]
            modules = [
                (_plain_attributes(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules_of(self.model)
            ]
            # a compiled program holds for these shapes, dtypes, modes and hooks only
            case = ([(tensor.shape, tensor.dtype) for part in parts for tensor in part], modules, trained)
            # the first step looks once, uncompiled, which parameters the output depends on
            if self.case is None and len(parts) == 2:
                self.reached, self.case = self._reached(parts[0]), case
                own = [*(parameters[i] for i in self.reached), *self.model.buffers()]
                index = {id(tensor): i for i, tensor in enumerate(own)}
                self.slots = [(name, index[id(t)]) for name, t in slots_of(self.model) if id(t) in index]
            # another case, such as a smaller last batch: the same step, not compiled
            if case != self.case:
                return Forward(self.problem)(batch, meta_batch, undo)
            if self.loss_network.kind == "classification":  # a compiled kernel reads beyond the end
                check_targets(parts[0][1], "batch: targets", classes=self.outputs)
                check_targets(parts[1][1], "meta_batch: targets", classes=self.outputs)
            return self._step(parts[0], parts[1], undo.before)

    def _step(self, batch: Batch, meta_batch: Batch, copies: list[Tensor]) -> MetaStep:
        torch.compiler.cudagraph_mark_step_begin()
        parameters = optimizer_parameters(self.optimizer)
        theta = [parameters[i].detach() for i in self.reached]
        before, buffers = [copies[i] for i in self.reached], [buffer.clone() for buffer in self.model.buffers()]
        phi = [parameter.detach() for parameter in self.loss_network.parameters()]

        found = self._run(self.training_pass, theta, buffers, phi, *batch)
        prediction, training_loss, slope, gradients, new_buffers = found
        check_early(training_loss, self.model)
        with torch.no_grad():
            for buffer, new in zip(self.model.buffers(), new_buffers, strict=True):
                buffer.copy_(new)
        # θ' = U(θ, g) by the optimizer itself, between the compiled passes
        pullback = take_step(self.optimizer, parameters, self.reached, gradients, self.problem.clipping)

        meta_loss, v = self._run(self.meta_pass, theta, new_buffers, *meta_batch)
        # equation (1) of engines.forward
        w = pullback(v)
        # equations (2) and (3) in one program
        tangent, along = self._run(self.tangent_pass, before, w, buffers, phi, prediction, *batch)
        precision = tolerance_of(self.problem.autocast or prediction.dtype, *(g.dtype for g in gradients))
        along_w = inner_product(slope, tangent)
        check_agreement(gradients, w, along_w, lambda: slope.norm() * tangent.norm(), tolerance=precision)
        wanted = [g for g, p in zip(along, self.loss_network.parameters(), strict=True) if p.requires_grad]
        # cloned, since a CUDA graph writes its results to the same place at every step
        meta_gradient, *others = wanted, training_loss, meta_loss, prediction, tangent
        return MetaStep([gradient.clone() for gradient in meta_gradient], *(other.clone() for other in others))

    def _reached(self, batch: Batch) -> list[int]:
        """Which of the optimizer's parameters the output depends on, and whether the step can be compiled at all."""
        random, parameters = RandomState(self.model), optimizer_parameters(self.optimizer)
        with replaced(self.model, {id(buffer): buffer.clone() for buffer in self.model.buffers()}):
            prediction = forward(self.model, batch[0], self.problem.autocast)
        if RandomState(self.model) != random:
            raise ValueError("the model draws random numbers, which a compiled step cannot repeat; leave compile out")
        self.loss_network(prediction, batch[1])  # says what does not fit
        self.outputs = prediction.shape[-1]
        gradients = gradients_of(prediction.sum(), parameters)
        return [i for i, gradient in enumerate(gradients) if gradient is not None]

    @torch.no_grad()
    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"torch.compile cannot serve this model, loss or machine: {error}\n(leave compile={self.mode!r} out)"
            ) from error

    def _forward(self, theta: list[Tensor], buffers: list[Tensor], inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f(x), and the buffers that the pass leaves behind."""
        new = [buffer.clone() for buffer in buffers]
        tensors = [*theta, *new]
        return forward(self.model, inputs, self.problem.autocast, {name: tensors[i] for name, i in self.slots}), new

    def _derivatives(self, phi: list[Tensor], prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Along]:
        pairs = output_pairs(self.loss_network.kind, prediction, targets, phi[0].dtype)
        return derivatives(self.loss_network, phi, *pairs)

    def _training_pass(
        self, theta: list[Tensor], buffers: list[Tensor], phi: list[Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """f, M_φ, ∂M_φ/∂f, ∇_θ M_φ = J_fᵀ ∂M_φ/∂f and the new buffers."""
        passed: Any = vjp(lambda t: self._forward(t, buffers, inputs), theta, has_aux=True)
        prediction, pull_back, new = passed
        loss, slope, _ = self._derivatives(phi, prediction, targets)
        slope = slope.to(prediction.dtype)
        (gradients,) = pull_back(slope)
        return prediction, loss, slope, list(gradients), new

    def _meta_pass(
        self, theta: list[Tensor], buffers: list[Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """L_T and its gradient v = ∇_θ L_T, at the θ that the step reached."""
        passed: Any = vjp(lambda t: self.problem.task_loss(self._forward(t, buffers, inputs)[0], targets), theta)
        loss, pull_back = passed
        return loss, list(pull_back(torch.ones_like(loss))[0])

    def _tangent_pass(
        self,
        theta: list[Tensor],
        w: list[Tensor],
        buffers: list[Tensor],
        phi: list[Tensor],
        prediction: Tensor,
        inputs: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """u = J_f w and ∇_φ ⟨∂M_φ/∂f, u⟩."""
        passed: Any = jvp(lambda t: self._forward(t, buffers, inputs)[0], (theta,), (w,))
        tangent = passed[1]
        return tangent, self._derivatives(phi, prediction, targets)[2](tangent.to(phi[0].dtype))
