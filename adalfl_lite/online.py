"""Algorithm 2: the loss network adapts after every step of the base model (paper, section on online adaptation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from adalfl_lite.checks import check_batch, check_finite, check_values
from adalfl_lite.compiled import CompiledStep
from adalfl_lite.distributed import start_equal
from adalfl_lite.losses import Loss, task_loss
from adalfl_lite.metagradient import (
    Batch,
    ForwardPass,
    MetaStep,
    forward_mode_step,
    shared_forward_step,
    trained_parameter_names,
    unrolled_step,
)
from adalfl_lite.updates import optimizer_parameters

ENGINES = ("forward", "shared", "finite-difference", "unrolled")

META_LEARNING_RATE = 1e-5


class OnlineLoss:
    """Trains a model with a loss network that is updated after each of the model's steps:

        θ ← U(θ, ∇_θ M_φ(train batch)),     φ ← φ − η ∇_φ L_T(meta batch, θ)                             (1)

    The loop, the data and the optimizer stay yours; replace ``loss.backward(); optimizer.step()`` by :meth:`step`.

    Args:
        model: f_θ. Its mode is respected: call ``model.train()`` yourself.
        loss_network: M_φ, usually a :class:`~adalfl_lite.losses.LossNetwork`; any module of (prediction, target).
        optimizer: torch.optim optimizer over the model's parameters, with a differentiable update.
        meta_optimizer: optimizer over ``loss_network.parameters()``; by default Adam.
        meta_learning_rate: η of the default meta-optimizer; 0 freezes φ. Ignored when ``meta_optimizer`` is given.
        task_loss: L_T(prediction, target); by default the one of ``loss_network.kind``.
        clip_meta_gradient: scale ∇_φ L_T down to this norm where it is longer; None, the default, leaves it.
        engine: "forward" (exact, fast), "shared" (the same, faster where the meta batch is the next training batch),
            "finite-difference" (approximate, faster) or "unrolled" (reference), see :mod:`adalfl_lite.metagradient`.
        autocast: dtype, such as ``torch.bfloat16``, for the base model's passes; φ and the losses keep their own.
        process_group: of ``torch.distributed``, such as ``torch.distributed.group.WORLD``: every process hands an equal
            share of each batch to :meth:`step`, and all learn as one process with the whole batches would. They start
            from the first one's θ and φ. BatchNorm sees the shares, as in torch's own data parallelism.
        compile: a mode of ``torch.compile`` for the whole step, such as "default", or "reduce-overhead", which on a GPU
            records CUDA graphs; None does not compile. For engine "forward", models without dropout and a
            :class:`~adalfl_lite.losses.LossNetwork`. The first step takes long, see :mod:`adalfl_lite.compiled`.

    Raises:
        ValueError, TypeError: something above cannot work, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_network: nn.Module,
        optimizer: Optimizer,
        *,
        meta_optimizer: Optimizer | None = None,
        meta_learning_rate: float = META_LEARNING_RATE,
        task_loss: Loss | None = None,
        clip_meta_gradient: float | None = None,
        engine: str = "forward",
        autocast: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        compile: str | None = None,
    ):
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
        if not meta_learning_rate >= 0:
            raise ValueError(f"meta_learning_rate must be 0 or more, got {meta_learning_rate}")
        trained_parameter_names(model, optimizer)
        if clip_meta_gradient is not None and not clip_meta_gradient > 0:
            raise ValueError(f"clip_meta_gradient must be positive, or None not to clip; got {clip_meta_gradient}")
        _check_model(model, engine, autocast)
        _check_loss_network(loss_network, model, meta_optimizer)
        self.model, self.loss_network, self.optimizer = model, loss_network, optimizer
        self.meta_optimizer = meta_optimizer or torch.optim.Adam(loss_network.parameters(), lr=meta_learning_rate)
        self.task_loss = task_loss or default_task_loss(loss_network)
        self.clip_meta_gradient, self.engine, self.autocast = clip_meta_gradient, engine, autocast
        self.process_group = process_group
        self._kept: ForwardPass | None = None
        if process_group is not None:
            if engine == "unrolled":
                raise ValueError("engine='unrolled' runs in one process; leave process_group out")
            start_equal([model, loss_network], process_group)
        self.compiled: CompiledStep | None = None
        if compile is not None:
            if engine != "forward" or process_group is not None:
                raise ValueError(f"compile={compile!r} needs engine='forward' and no process_group; leave it out")
            arguments = (model, loss_network, optimizer, self.task_loss)
            self.compiled = CompiledStep(*arguments, mode=compile, autocast=autocast)

    def step(self, batch: Batch, meta_batch: Batch) -> MetaStep:
        """One update of θ on ``batch``, then one of φ on ``meta_batch``; each is (inputs, targets).

        With ``engine="shared"``, let ``meta_batch`` be the next training batch, and hand the same two tensors to the
        next call as its ``batch``: their forward pass is then run once instead of twice. Any other batch is right too,
        but saves nothing.

        Raises:
            FloatingPointError: the learned loss, the task loss or the meta-gradient is not finite. φ is left unchanged,
                and where it is the learned loss, on the CPU, θ as well; catch it to leave the batch out, or to go back
                to an earlier :meth:`state_dict`.
            ValueError: a batch is not what the model and the losses take; φ is left unchanged.
        """
        check_batch(batch, "batch", self.model)
        check_batch(meta_batch, "meta_batch", self.model)
        if batch[1].dtype != meta_batch[1].dtype:
            raise ValueError(
                f"targets are {batch[1].dtype} in batch, {meta_batch[1].dtype} in meta_batch; give the same"
            )
        try:
            result = self.meta_gradient([batch], meta_batch)
            self.apply_meta_gradient(result)
        except FloatingPointError:
            check_values(batch, "batch")
            check_values(meta_batch, "meta_batch")
            raise
        return result

    def meta_gradient(self, batches: Sequence[Batch], meta_batch: Batch) -> MetaStep:
        """Update θ on ``batches`` (one inner step each) and return ∇_φ L_T, leaving φ alone."""
        arguments = (self.model, self.loss_network, self.optimizer)
        if len(batches) != 1 and self.process_group is not None:
            raise ValueError(f"with a process_group one inner step is taken at a time, got {len(batches)} batches")
        if self.compiled is not None and len(batches) == 1:
            return self.compiled(batches[0], meta_batch)
        if self.engine == "unrolled" or len(batches) != 1:
            return unrolled_step(*arguments, batches, meta_batch, self.task_loss, autocast=self.autocast)
        if self.engine == "shared":
            kept, self._kept = self._kept, None  # not to be used twice, should this step fail
            result, self._kept = shared_forward_step(
                *arguments,
                batches[0],
                meta_batch,
                self.task_loss,
                kept,
                autocast=self.autocast,
                process_group=self.process_group,
            )
            return result
        return forward_mode_step(
            *arguments,
            batches[0],
            meta_batch,
            self.task_loss,
            finite_difference=self.engine == "finite-difference",
            autocast=self.autocast,
            process_group=self.process_group,
        )

    def apply_meta_gradient(self, result: MetaStep) -> None:
        """One step of the meta-optimizer with ``result.meta_gradient``, checked to be finite, and clipped if so wished.

        Raises:
            FloatingPointError: see :meth:`step`.
        """
        named = [(name, p) for name, p in self.loss_network.named_parameters() if p.requires_grad]
        values = {"learned loss": result.learned_loss, "task loss": result.task_loss}
        values |= {f"meta-gradient of {name}": g for (name, _), g in zip(named, result.meta_gradient, strict=True)}
        check_finite(values, self.model, ", or initialise the loss network for this optimizer (adalfl_lite.initialise)")
        for (_, parameter), gradient in zip(named, result.meta_gradient, strict=True):
            parameter.grad = gradient
        if self.clip_meta_gradient is not None:
            nn.utils.clip_grad_norm_([parameter for _, parameter in named], self.clip_meta_gradient)
        self.meta_optimizer.step()
        for _, parameter in named:
            parameter.grad = None

    def state_dict(self) -> dict:
        """θ, φ and both optimizers' states, loadable with ``weights_only=True``."""
        return {
            "model": self.model.state_dict(),
            "loss_network": self.loss_network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` gave; ``ValueError`` naming what it lacks."""
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}; give what state_dict() returned")
        self.model.load_state_dict(state["model"])
        self.loss_network.load_state_dict(state["loss_network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])


def default_task_loss(loss_network: nn.Module) -> Loss:
    """L_T for the network's ``kind``; ``ValueError`` if it has none."""
    kind = getattr(loss_network, "kind", None)
    if kind is None:
        raise ValueError(f"{type(loss_network).__name__} has no attribute 'kind'; pass task_loss=...")
    return task_loss(kind)


def _check_model(model: nn.Module, engine: str, autocast: torch.dtype | None) -> None:
    """What would end in an error of torch's, or in a wrong number, within the first step."""
    if engine == "unrolled" and hasattr(model, "_orig_mod"):
        raise ValueError("a compiled model has no double backward; use engine='forward', or do not compile it")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            raise ValueError(f"the layer {name!r} gives sparse gradients, which have no derivative; use sparse=False")
    if autocast is not None and not autocast.is_floating_point:
        raise ValueError(f"autocast must be a floating-point dtype such as torch.bfloat16, got {autocast}")


def _check_loss_network(loss_network: nn.Module, model: nn.Module, meta_optimizer: Optimizer | None) -> None:
    if not isinstance(loss_network, nn.Module):
        raise TypeError(
            f"the loss network must be a torch.nn.Module, got {type(loss_network).__name__};"
            " LossNetwork.classification() and LossNetwork.regression() make one"
        )
    phi = {id(parameter) for parameter in loss_network.parameters() if parameter.requires_grad}
    if not phi:
        raise ValueError(
            f"{type(loss_network).__name__} has no parameter that requires a gradient; to keep the loss as it is,"
            " use meta_learning_rate=0, or train without OnlineLoss"
        )
    devices = [next(module.parameters()).device for module in (loss_network, model)]
    if devices[0] != devices[1]:
        raise ValueError(
            f"the loss network is on {devices[0]}, the model on {devices[1]}; use loss_network.to({str(devices[1])!r})"
        )
    if phi & {id(parameter) for parameter in model.parameters()}:
        raise ValueError("the model and the loss network share a parameter; give each its own")
    if meta_optimizer is not None and not phi >= {id(parameter) for parameter in optimizer_parameters(meta_optimizer)}:
        raise ValueError("meta_optimizer holds a parameter that is not φ; build it from loss_network.parameters()")
