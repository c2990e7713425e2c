"""Parameter counts are exact, shapes are right or refused, and forward-mode derivatives agree with reverse mode."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp
from torch.utils.flop_counter import FlopCounterMode

from adalfl_lite.models import build_model, model_names

COUNTS = [
    ("linear", (784,), 10, 7_850),
    ("mlp64", (64,), 10, 4_810),
    ("mlp", (1, 28, 28), 10, 1_796_010),
    ("lenet5", (1, 28, 28), 10, 44_426),
    ("allcnn_c", (3, 32, 32), 10, 1_372_254),
    ("squeezenet", (3, 32, 32), 10, 734_986),
    ("wrn16_8", (3, 32, 32), 10, 10_961_370),
    ("resnet18", (3, 32, 32), 10, 11_173_962),
    ("vgg16", (3, 32, 32), 10, 14_728_266),
    ("wrn28_10", (3, 32, 32), 100, 36_536_884),
]
FLAT = ["linear", "mlp64", "mlp"]
SMALLEST = {"lenet5": 16, "allcnn_c": 9, "squeezenet": 8, "wrn16_8": 4, "resnet18": 8, "vgg16": 32, "wrn28_10": 4}
ODD_SHAPES = [(name, (5,)) for name in FLAT] + [(name, (2, 3, 4)) for name in FLAT]
ODD_SHAPES += [(name, (2, side, side + 5)) for name, side in SMALLEST.items()] + [("lenet5", (3, 32, 32))]


@pytest.mark.parametrize(("name", "input_shape", "outputs", "count"), COUNTS)
def test_parameter_counts(name: str, input_shape: tuple[int, ...], outputs: int, count: int) -> None:
    with torch.device("meta"):
        model = build_model(name, input_shape=input_shape, outputs=outputs)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


MULTIPLY_ADDS = [
    ("lenet5", 281_640),
    ("squeezenet", 52_543_488),
    ("allcnn_c", 270_798_336),
    ("vgg16", 313_201_664),
    ("resnet18", 555_422_720),
    ("wrn16_8", 1_548_145_664),
    ("wrn28_10", 5_243_386_368),
]


@pytest.mark.parametrize(("name", "multiply_adds"), MULTIPLY_ADDS)
def test_multiply_adds_per_image(name: str, multiply_adds: int) -> None:
    """The counts add up output positions x inputs x outputs over all layers by hand, so they pin strides and pooling.

    Parameter counts do not: they stay the same when a network pools too early and computes less.
    """
    input_shape, outputs = next((shape, outputs) for model, shape, outputs, _ in COUNTS if model == name)
    with torch.device("meta"):
        model = build_model(name, input_shape=input_shape, outputs=outputs)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, *input_shape))
    assert counter.get_total_flops() == 2 * 2 * multiply_adds  # two images, two operations each


def test_every_model_has_a_count() -> None:
    assert model_names() == [name for name, *_ in COUNTS]
    assert set(model_names()) == {*FLAT, *SMALLEST}


@pytest.mark.parametrize(("name", "input_shape", "outputs", "count"), COUNTS)
def test_forward_in_train_and_eval_mode(name: str, input_shape: tuple[int, ...], outputs: int, count: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, input_shape=input_shape, outputs=outputs)
    assert model.training
    inputs = torch.randn(2, *input_shape)
    with torch.no_grad():
        predictions = model(inputs)
        assert predictions.shape == (2, outputs) and predictions.isfinite().all()
        assert not torch.equal(predictions[0], predictions[1]), "the output depends on the input"
        assert (predictions < 0).any(), "raw outputs, not clipped at 0"
        model.eval()
        torch.testing.assert_close(model(inputs[:1]), model(inputs)[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "input_shape"), ODD_SHAPES)
def test_other_shapes_channels_and_outputs(name: str, input_shape: tuple[int, ...]) -> None:
    model = build_model(name, input_shape=input_shape, outputs=3)
    with torch.no_grad():
        assert model(torch.randn(2, *input_shape)).shape == (2, 3)


@pytest.mark.parametrize("name", SMALLEST)
def test_forward_mode_agrees_with_reverse_mode(name: str) -> None:
    """⟨c, J w⟩ = ⟨Jᵀ c, w⟩ in float64 and train mode, and the tangent pass leaves the model as it was."""
    torch.manual_seed(0)
    side = max(16, SMALLEST[name])
    model = build_model(name, input_shape=(1, side, side), outputs=4).double()
    inputs = torch.randn(3, 1, side, side, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def outputs(theta: dict[str, torch.Tensor]) -> torch.Tensor:
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        return functional_call(model, {**theta, **buffers}, (inputs,))

    w = {key: torch.randn_like(value) for key, value in parameters.items()}
    value, tangent = jvp(outputs, (parameters,), (w,))
    assert value.shape == tangent.shape == (3, 4) and tangent.isfinite().all() and tangent.abs().min() > 0
    cotangent = torch.randn_like(tangent)
    (gradient,) = vjp(outputs, parameters)[1](cotangent)
    reverse = sum((gradient[key] * w[key]).sum() for key in w)
    torch.testing.assert_close((cotangent * tangent).sum(), reverse, rtol=1e-8, atol=1e-8)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(("name", "input_shape", "outputs", "count"), COUNTS)
def test_no_inplace_activation_and_no_dropout(name, input_shape, outputs, count) -> None:
    with torch.device("meta"):
        model = build_model(name, input_shape=input_shape, outputs=outputs)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    assert not any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())


@pytest.mark.parametrize("name", ["mlp64", "lenet5", "allcnn_c", "squeezenet"])
def test_the_torch_seed_decides_the_initialisation(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model(name, input_shape=(1, 28, 28), outputs=2).state_dict())
    first = next(iter(states[0]))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][first], states[2][first])


@pytest.mark.parametrize("name", SMALLEST)
def test_wrong_image_shapes_are_refused(name: str) -> None:
    side = SMALLEST[name]
    for shape in [(784,), (32, 32), (8, 3, 32, 32), (3, side - 1, 32), (3, 32, side - 1)]:
        with pytest.raises(ValueError) as caught:
            build_model(name, input_shape=shape, outputs=10)
        assert str(shape) in str(caught.value) and name in str(caught.value) and str(side) in str(caught.value)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'lenet'; did you mean 'lenet5'. known models: .*mlp"):
        build_model("lenet", input_shape=(1, 28, 28), outputs=10)
    for shape in [(), (0,), (3, -1, 32)]:
        with pytest.raises(ValueError) as caught:
            build_model("linear", input_shape=shape, outputs=10)
        assert f"input_shape={shape}" in str(caught.value)
    with pytest.raises(ValueError, match="outputs=0"):
        build_model("linear", input_shape=(4,), outputs=0)
