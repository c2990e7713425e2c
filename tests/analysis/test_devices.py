"""Every function of a model gives in single precision, and on a GPU where there is one, what it gives in double."""

import dataclasses
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import analysis as an


def model_and_data(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).eval()
    inputs, targets = torch.randn(12, 1, 6, 6), torch.randint(4, (12,))
    return model.to(dtype), (inputs.to(dtype), targets)


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Three checkpoints that span a plane."""
    torch.manual_seed(1)
    noise = [[torch.randn(p.shape, dtype=torch.float64) for p in model.parameters()] for _ in range(3)]
    names = [name for name, _ in model.named_parameters()]
    start = dict(model.named_parameters())
    return [{n: start[n].detach() + 0.1 * d.to(start[n]) for n, d in zip(names, parts, strict=True)} for parts in noise]


def twice(prediction: Tensor, target: Tensor) -> Tensor:
    return 2 * F.cross_entropy(prediction, target, label_smoothing=0.1)


ce = F.cross_entropy
CALLS = {
    "adaptive_sharpness": lambda m, d: an.sharpness(m, ce, d, adaptive=True),
    "compare_attributions": lambda m, d: an.compare_attributions(m, m, d[0], top_k=3)["overlap"],
    "effective_learning_rate": lambda m, d: an.effective_learning_rate(m, twice, ce, d),
    "effective_learning_rate_by_layer": lambda m, d: an.effective_learning_rate(m, twice, ce, d, by_layer=True),
    "grad_cam": lambda m, d: an.grad_cam(m, d[0], "0").values,
    "gradient_cosine": lambda m, d: an.gradient_cosine(m, twice, d, (d[0][:6], d[1][:6])),
    "gradient_noise": lambda m, d: an.gradient_noise(m, ce, d),
    "gradient_noise_by_layer": lambda m, d: an.gradient_noise(m, ce, d, by_layer=True),
    "gradient_norms": lambda m, d: an.gradient_norms(m, ce, d),
    "implied_label_smoothing": lambda m, d: an.implied_label_smoothing(m, twice, d),
    "influence": lambda m, d: an.influence(m, twice, ce, d, d, 0.1),
    "integrated_gradients": lambda m, d: an.integrated_gradients(m, d[0]).values,
    "interpolate": lambda m, d: an.interpolate(m, ce, d, *states(m)[:2], positions=[0, 0.5, 1]),
    "layer_integrated_gradients": lambda m, d: an.integrated_gradients(m, d[0], layer="2").values,
    "line": lambda m, d: an.line(m, ce, d, positions=[-1, 0, 1], batchnorm="recalibrate"),
    "logit_statistics": lambda m, d: an.logit_statistics(m, d),
    "mean_gradients": lambda m, d: an.mean_gradients(m, [ce], d),
    "occlusion": lambda m, d: an.occlusion(m, d[0], window=2).values,
    "penultimate_statistics": lambda m, d: an.penultimate_statistics(m, d),
    "per_sample_gradients": lambda m, d: an.per_sample_gradients(m, ce, d),
    "plane": lambda m, d: an.plane(m, twice, d, x=[-1, 0, 1], y=[0, 1], batchnorm="train"),
    "predictions": lambda m, d: an.predictions(m, d),
    "push_and_gap": lambda m, d: an.push_and_gap(m, twice, ce, d, (d[0][:6], d[1][:6])),
    "random_directions": lambda m, d: an.random_directions(m, 2),
    "sharpness": lambda m, d: an.sharpness(m, ce, d),
    "spectral_density": lambda m, d: _total(an.spectral_density(m, ce, d, nodes=12)),
    "target_gradients": lambda m, d: an.target_gradients(m, twice, d),
    "top_eigenpairs": lambda m, d: an.top_eigenpairs(m, ce, d, 2).values,
    "trace": lambda m, d: an.trace(m, ce, d, method="exact"),
    "trajectory": lambda m, d: an.trajectory(m, states(m)).coordinates,
}


def _total(spectrum: an.SpectralDensity) -> float:
    """The vectors that a density starts from differ between devices; that it integrates to one does not."""
    return float(np.trapezoid(spectrum.density, spectrum.eigenvalues))


def numbers(result: object) -> np.ndarray:
    """All numbers of a result, one after the other."""
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, pd.DataFrame):
        result = result.select_dtypes("number").to_numpy()
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return np.concatenate([numbers(part) for part in result])
    if isinstance(result, Tensor):
        result = result.detach().cpu().numpy()
    return np.asarray(result, dtype=np.float64).ravel()


def test_no_function_of_a_model_is_forgotten():
    functions = [name for name in an.__all__ if inspect.isfunction(getattr(an, name))]
    assert set(CALLS) == {name for name in functions if "model" in inspect.signature(getattr(an, name)).parameters}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", CALLS)
def test_single_precision_on_every_device(name, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    expected = numbers(CALLS[name](*model_and_data(torch.float64)))
    model, data = model_and_data(torch.float32)
    found = numbers(CALLS[name](model.to(device), (data[0].to(device), data[1].to(device))))
    scale = np.abs(expected[np.isfinite(expected)]).max()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * scale)
