"""Attributions against their axioms, linear models, and computations by hand with autograd, in float64."""

import doctest
from functools import partial

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis.attribution
from analysis.attribution import (
    attribution_agreement,
    compare_attributions,
    grad_cam,
    integrated_gradients,
    occlusion,
    plot_feature_attributions,
    plot_image_attribution,
)

FLOAT32 = 2e-7  # captum's weights of quadrature, and its means over windows, are of float32


@pytest.fixture(autouse=True)
def fresh_figures():
    yield
    plt.close("all")


def mlp(seed=0, outputs=3):
    torch.manual_seed(seed)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, outputs)
    return nn.Sequential(*layers).double().train()


def convnet(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(48, 4)
    return nn.Sequential(*layers).double().train()


def table(n=5, seed=1):
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(n=3, seed=1):
    return torch.randn(n, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chosen(outputs, target):
    return outputs.gather(1, target[:, None])[:, 0]


def test_docstring_examples():
    assert doctest.testmod(analysis.attribution).failed == 0


@pytest.mark.parametrize("baseline", [0.0, -1.5, torch.linspace(-1, 1, 6).double(), table(seed=9)])
def test_of_a_linear_model_they_are_weight_times_displacement(baseline):
    model, x, target = nn.Linear(6, 3).double(), table(), torch.tensor([0, 1, 2, 2, 0])
    expected = (model.weight[target] * (x - baseline)).detach()
    exact = integrated_gradients(model, x, target, baseline, steps=2)  # weights of ½ are exact in float32, too
    torch.testing.assert_close(exact.values, expected, rtol=0, atol=1e-14)
    assert exact.delta.abs().max() < 1e-14
    close = integrated_gradients(model, x, target, baseline)
    torch.testing.assert_close(close.values, expected, rtol=FLOAT32, atol=1e-14)
    removed = occlusion(model, x, target=target, baseline=baseline)
    torch.testing.assert_close(removed.values, expected, rtol=FLOAT32, atol=1e-12)


def test_integrated_gradients_are_the_integral_by_hand():
    model, x, b = mlp(), table(), table(seed=2)
    result = integrated_gradients(model, x, 1, b)
    model.eval()
    steps, expected = 20_000, torch.zeros_like(x)
    for part in ((torch.arange(steps) + 0.5) / steps).split(2000):  # the midpoint rule
        path = (b + part.double()[:, None, None] * (x - b)).flatten(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(model(path)[:, 1].sum(), path)
        expected += gradient.view(-1, *x.shape).sum(0) / steps * (x - b)
    torch.testing.assert_close(result.values, expected, rtol=1e-6, atol=1e-8)


def test_integrated_gradients_are_complete():
    model, x, b = mlp(), table(), table(seed=2)
    result = integrated_gradients(model, x, baseline=b)
    model.eval()
    outputs = model(x).detach()
    assert torch.equal(result.target, outputs.argmax(1))
    difference = chosen(outputs, result.target) - chosen(model(b).detach(), result.target)
    total = result.values.sum(1)
    torch.testing.assert_close(total, difference, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.delta, total - difference, rtol=0, atol=1e-14)


def test_delta_tells_of_too_few_steps():
    model, x = mlp(), 5 * table()
    few, many = (integrated_gradients(model, x, steps=steps) for steps in (2, 128))
    assert few.delta.abs().max() > 1e-2 > 1e-6 > many.delta.abs().max()
    model.eval()
    error = few.values.sum(1) - chosen(model(x) - model(torch.zeros_like(x)), few.target)
    torch.testing.assert_close(few.delta, error.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 2, 99])
def test_chunks_do_not_matter(chunk_size):
    model, x, b = mlp(), table(), table(seed=2)
    for method in (integrated_gradients, occlusion):
        whole, parts = method(model, x, baseline=b), method(model, x, baseline=b, chunk_size=chunk_size)
        torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=1e-13)
    cam = [grad_cam(convnet(), images(), "2", chunk_size=size).values for size in (chunk_size, 3)]
    torch.testing.assert_close(*cam, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_single_output_needs_no_target(shape):
    model = nn.Sequential(nn.Linear(6, 1), nn.Unflatten(1, (1,)), nn.Flatten(0)).double()
    model[2] = nn.Flatten(0) if shape == (-1,) else nn.Identity()
    x = table()
    assert model(x).ndim == len(shape)
    result = integrated_gradients(model, x, steps=2)
    torch.testing.assert_close(result.values, model[0].weight.detach() * x, rtol=0, atol=1e-14)
    assert result.target.tolist() == [0] * 5 and result.values.dtype == torch.float64


@pytest.mark.parametrize("layer", ["0", "1", "2", "5"])
def test_a_layers_attributions_are_those_of_the_model_above_it(layer):
    model, x = convnet(), images()
    model.requires_grad_(False)
    result = integrated_gradients(model, x, 2, baseline=0.3, layer=layer)
    below, above = convnet()[: int(layer) + 1], convnet()[int(layer) + 1 :]
    below[1 if len(below) > 1 else 0].inplace = False
    with torch.no_grad():
        hidden, start = below(x), below(torch.full_like(x, 0.3))
    expected = integrated_gradients(above, hidden, 2, baseline=start)
    torch.testing.assert_close(result.values, expected.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.delta, expected.delta, rtol=0, atol=1e-12)


def test_a_layers_attributions_are_complete_unless_a_connection_passes_it_by():
    class Residual(nn.Module):
        def __init__(self, passing):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.branch, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.passing = passing

        def forward(self, x):
            x = self.stem(x).tanh()
            return self.head(self.branch(x).sigmoid() + self.passing * x)

    whole, around = Residual(0.0).double(), Residual(1.0).double()
    assert integrated_gradients(whole, table(), layer="branch").delta.abs().max() < 1e-6
    assert integrated_gradients(around, table(), layer="branch").delta.abs().max() > 1e-2
    assert integrated_gradients(around, table(), layer="stem").delta.abs().max() < 1e-6


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_by_hand(relu):
    model, x = convnet(), images()
    result = grad_cam(model, x, "2", relu=relu)
    model[1].inplace = False
    maps = model[:3](x).detach().requires_grad_()
    outputs = model[3:](maps)
    (gradient,) = torch.autograd.grad(chosen(outputs, outputs.argmax(1)).sum(), maps)
    cam = torch.einsum("nk,nkhw->nhw", gradient.mean((2, 3)), maps.detach())[:, None]
    cam = cam.clamp(min=0) if relu else cam
    expected = F.interpolate(cam, (8, 8), mode="bilinear")
    torch.testing.assert_close(result.values, expected, rtol=0, atol=1e-14)
    assert result.values.abs().max() > 1e-3 and (result.values.min() < -1e-4) == (not relu)
    assert result.delta is None


@pytest.mark.parametrize("window, stride", [(1, 1), (3, 2), (8, 1)])
def test_occlusion_by_hand(window, stride):
    model, x, b = convnet(), images(), images(seed=5)
    result = occlusion(model, x, target=1, baseline=b, window=window, stride=stride)
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    starts = range(0, 8 - window + stride, stride)
    with torch.no_grad():
        for i in starts:
            for j in starts:
                box = slice(i, i + window), slice(j, j + window)
                covered = x.clone()
                covered[(..., *box)] = b[(..., *box)]
                total[(..., *box)] += (model(x) - model(covered))[:, 1, None, None, None]
                count[(..., *box)] += 1
    torch.testing.assert_close(result.values, total / count, rtol=FLOAT32, atol=FLOAT32)


def test_features_that_are_zero_are_in_no_overlap():
    """Grad-CAM's maps are zero in most places; which of those come first is nobody's choice."""
    a, b = torch.zeros(4, 64), torch.zeros(4, 64)
    a[0, 50], b[0, 60] = 1.0, 1.0  # disjoint
    a[1, 50] = b[1, 50] = 1.0  # the same
    a[2, 50], b[2, 50:54] = 1.0, 1.0  # one of four
    assert attribution_agreement(a, b, top_k=6).overlap.tolist() == pytest.approx([0, 1, 0.25, np.nan], nan_ok=True)


def test_agreement_is_pandas_and_sets():
    a, b = images(4, seed=1), images(4, seed=2) + 0.5 * images(4, seed=1)
    frame = attribution_agreement(a, b, top_k=20)
    for i, row in frame.iterrows():
        x, y = pd.Series(a[i].flatten()), pd.Series(b[i].flatten())
        assert row.spearman == pytest.approx(x.rank().corr(y.rank()), abs=1e-12)
        common = set(x.abs().nlargest(20).index) & set(y.abs().nlargest(20).index)
        assert row.overlap == len(common) / 20
    assert frame.spearman.between(0.1, 0.9).all()


def test_agreement_with_itself_with_its_negative_and_with_a_permutation():
    values = table(40)
    own = attribution_agreement(values, values)
    assert own.spearman.tolist() == pytest.approx([1] * 40) and own.overlap.tolist() == [1] * 40
    negative = attribution_agreement(values, -values)
    assert negative.spearman.tolist() == pytest.approx([-1] * 40) and negative.overlap.tolist() == [1] * 40
    permuted = attribution_agreement(values, values.roll(1, 1), top_k=3)
    assert permuted.spearman.mean() < 0.2 and permuted.overlap.mean() == pytest.approx(3 / 6, abs=0.15)
    constant = attribution_agreement(values, torch.ones_like(values))
    assert constant.spearman.isna().all()


@pytest.mark.parametrize(
    "method, options",
    [(integrated_gradients, {}), (occlusion, {"window": 2}), (integrated_gradients, {"layer": "1"})],
)
def test_a_model_agrees_with_itself_more_than_with_one_of_permuted_inputs(method, options):
    model, permuted, x = mlp(), mlp(), table(20)
    with torch.no_grad():
        permuted[0].weight.copy_(permuted[0].weight.roll(2, 1))
    own = compare_attributions(model, model, x, partial(method, **options))
    other = compare_attributions(model, permuted, x, partial(method, **options))
    assert own.spearman.tolist() == pytest.approx([1] * 20) and own.overlap.tolist() == [1] * 20
    assert other.spearman.mean() < 0.8 and other.overlap.mean() < 0.8
    assert other.target.tolist() == model.eval()(x).argmax(1).tolist() == own.target.tolist()


def test_models_are_compared_on_the_output_that_the_first_predicts():
    model, other, x = mlp(0), mlp(3), table(20)
    target = integrated_gradients(model, x).target
    expected = attribution_agreement(
        integrated_gradients(model, x).values, integrated_gradients(other, x, target).values, top_k=2
    )
    pd.testing.assert_frame_equal(compare_attributions(model, other, x, top_k=2)[["spearman", "overlap"]], expected)
    assert not torch.equal(target, integrated_gradients(other, x).target)
    with pytest.raises(ValueError, match="from 0 to 0"):
        compare_attributions(model, mlp(outputs=1), x)


FUNCTIONS = {
    "integrated_gradients": lambda model, x: integrated_gradients(model, x, steps=4),
    "layer_integrated_gradients": lambda model, x: integrated_gradients(model, x, steps=4, layer="0"),
    "grad_cam": lambda model, x: grad_cam(model, x, "2"),
    "occlusion": lambda model, x: occlusion(model, x, window=4, stride=4),
    "compare_attributions": lambda model, x: compare_attributions(model, model, x),
    "failing": lambda model, x: pytest.raises(ValueError, integrated_gradients, model, x, layer="9"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_the_model_is_left_as_it_was(name, grad_mode, unchanged):
    model = convnet()
    model.insert(3, nn.BatchNorm2d(3).double())
    model.insert(6, nn.Dropout(0.5))
    model[3].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in model.modules()]
    x = images().requires_grad_()
    before = x.detach().clone()
    with unchanged(model), torch.set_grad_enabled(grad_mode):
        FUNCTIONS[name](model, x)
    after = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in model.modules()]
    assert hooks == after and model[1].inplace
    assert torch.equal(x, before) and x.grad is None and x.requires_grad


def test_bad_input_is_named():
    model, x = mlp(), table()
    with pytest.raises(ValueError, match="inputs must not hold NaN"):
        integrated_gradients(model, x.index_fill(1, torch.tensor(0), float("nan")))
    with pytest.raises(ValueError, match="baseline must not hold NaN"):
        integrated_gradients(model, x, baseline=float("nan"))
    with pytest.raises(ValueError, match=r"baseline of shape \(5,\) does not broadcast to inputs \(5, 6\)"):
        integrated_gradients(model, x, baseline=torch.zeros(5))
    with pytest.raises(ValueError, match=r"N >= 1; got torch.float64 \(0, 6\)"):
        occlusion(model, x[:0])
    with pytest.raises(ValueError, match="got torch.int64"):
        occlusion(model, x.long())
    with pytest.raises(ValueError, match="target must be from 0 to 2, got 3 to 3"):
        integrated_gradients(model, x, 3)
    with pytest.raises(ValueError, match=r"or 5 of them; got torch.int64 \(4,\)"):
        integrated_gradients(model, x, torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"\(N, C\) or \(N,\) for 3 examples, got \(3, 4, 6, 6\)"):
        integrated_gradients(convnet()[:1], images())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        integrated_gradients(model, x, steps=0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        grad_cam(convnet(), images(), "2", chunk_size=0)
    with pytest.raises(ValueError, match=r"window 9 is larger than the inputs, of size \(8, 8\)"):
        occlusion(convnet(), images(), window=9)
    with pytest.raises(ValueError, match="stride 3 is larger than window 2"):
        occlusion(convnet(), images(), window=2, stride=3)
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(ValueError, match="has the training diverged"):
        integrated_gradients(model, x)


def test_bad_layers_are_named():
    with pytest.raises(ValueError, match="no layer 'conv1'; it has 0, 1, 2, 3, 4, 5"):
        integrated_gradients(convnet(), images(), layer="conv1")
    with pytest.raises(ValueError, match=r"such as a convolution; the inputs are \(3, 2, 8, 8\).*'5' \(3, 1\)"):
        grad_cam(convnet(), images(), "5")
    model = mlp()
    model[3] = model[1]  # one tanh, twice
    with pytest.raises(ValueError, match="'3' is called 2 times"):
        integrated_gradients(model, table(), layer="3")
    model = nn.Sequential(nn.Linear(6, 3).double())
    model[0].unused = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="'0.unused' is called 0 times"):
        integrated_gradients(model, table(), layer="0.unused")

    class Last(nn.Module):
        def forward(self, states):
            return states[0]

    model = nn.Sequential(nn.LSTM(6, 3), Last()).double()
    with pytest.raises(ValueError, match="return one tensor, but '0' returns tuple"):
        integrated_gradients(model, table(), layer="0")


def test_bad_attributions_are_named():
    with pytest.raises(ValueError, match=r"one shape \(N, ...\), got \(5, 6\) and \(4, 6\)"):
        attribution_agreement(table(), table(4))
    for shape in ((0, 6), (5, 0), (6,)):
        with pytest.raises(ValueError, match="must have one shape"):
            attribution_agreement(torch.zeros(shape), torch.zeros(shape))
    assert attribution_agreement(torch.ones(1, 1), torch.ones(1, 1)).overlap.tolist() == [1]
    with pytest.raises(ValueError, match="NaN"):
        attribution_agreement(table(), table() * float("nan"))
    with pytest.raises(ValueError, match="number of features, 6; got 7"):
        attribution_agreement(table(), table(), top_k=7)


def test_an_image_under_its_attribution():
    figure, ax = plt.subplots()
    values = images()[0]
    assert plot_image_attribution(images()[1], values, ax=ax) is ax
    image, heat = ax.images
    np.testing.assert_allclose(image.get_array(), images()[1].mean(0))
    np.testing.assert_allclose(heat.get_array(), values.sum(0))
    largest = values.sum(0).abs().max().item()
    assert heat.get_clim() == pytest.approx((-largest, largest)) and len(figure.axes) == 2
    plain = plot_image_attribution(torch.ones(8, 8), torch.zeros(8, 8), plt.figure().gca(), limit=3.0, colorbar=False)
    assert len(plain.figure.axes) == 1 and plain.images[1].get_clim() == (-3, 3)
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        plot_image_attribution(torch.ones(8, 8), torch.ones(8, 8), limit=0)
    with pytest.raises(ValueError, match=r"got \(8, 8\) and \(7, 8\)"):
        plot_image_attribution(torch.ones(8, 8), torch.ones(7, 8))
    with pytest.raises(ValueError, match="NaN"):
        plot_image_attribution(torch.ones(8, 8), torch.full((8, 8), float("nan")))


def test_a_bar_per_feature():
    values = torch.tensor([[1.0, -3.0, 0.0], [3.0, 1.0, 0.0], [2.0, -4.0, 0.0]])
    ax = plot_feature_attributions(values, plt.figure().gca(), names=["age", "rooms", "income"], top=2)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["rooms", "age"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([8 / 3, 2])
    assert ax.get_xlabel() == "Mean |attribution|"
    for one in (values[0], values[:1]):
        ax = plot_feature_attributions(one, ax=plt.figure().gca())
        assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "0", "2"]
        assert [bar.get_width() for bar in ax.patches] == pytest.approx([-3, 1, 0])
        assert ax.get_xlabel() == "Attribution"
    with pytest.raises(ValueError, match="2 names for 3 features"):
        plot_feature_attributions(values, names=["age", "rooms"])
    with pytest.raises(ValueError, match=r"got shape \(1, 2, 8, 8\)"):
        plot_feature_attributions(images(1))
