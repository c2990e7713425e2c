"""Names of the first edition: functions that have become an argument of another one."""

from __future__ import annotations

import warnings

import pandas as pd
from torch import Tensor, nn

from analysis.attribution import Attribution, integrated_gradients
from analysis.curvature import sharpness
from analysis.effective_lr import effective_learning_rate
from analysis.gradients import gradient_noise
from analysis.inputs import Data, Loss, State


def _warn(name: str, now: str) -> None:
    warnings.warn(f"analysis.{name} is now {now}; this name will go", DeprecationWarning, stacklevel=3)


def adaptive_sharpness(model: nn.Module, loss: Loss, data: Data, rho: float = 0.5, *, batchnorm: str = "eval") -> float:
    """What :func:`~analysis.curvature.sharpness` gives with ``adaptive=True``."""
    _warn("adaptive_sharpness", "sharpness(..., adaptive=True)")
    return sharpness(model, loss, data, rho, adaptive=True, batchnorm=batchnorm)


def effective_learning_rate_by_layer(
    model: nn.Module, loss: Loss, task_loss: Loss, data: Data, state: State | None = None
) -> pd.DataFrame:
    """What :func:`~analysis.effective_lr.effective_learning_rate` gives with ``by_layer=True``."""
    _warn("effective_learning_rate_by_layer", "effective_learning_rate(..., by_layer=True)")
    return effective_learning_rate(model, loss, task_loss, data, state, by_layer=True)


def gradient_noise_by_layer(
    model: nn.Module, loss: Loss, data: Data, state: State | None = None, chunk_size: int = 32
) -> pd.DataFrame:
    """What :func:`~analysis.gradients.gradient_noise` gives with ``by_layer=True``."""
    _warn("gradient_noise_by_layer", "gradient_noise(..., by_layer=True)")
    return gradient_noise(model, loss, data, state, chunk_size, by_layer=True)


def layer_integrated_gradients(
    model: nn.Module,
    layer: str,
    inputs: Tensor,
    target: int | Tensor | None = None,
    baseline: float | Tensor = 0.0,
    steps: int = 64,
    chunk_size: int = 16,
) -> Attribution:
    """What :func:`~analysis.attribution.integrated_gradients` gives with ``layer=``."""
    _warn("layer_integrated_gradients", "integrated_gradients(..., layer=...)")
    return integrated_gradients(model, inputs, target, baseline, steps, chunk_size, layer=layer)
