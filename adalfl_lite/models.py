"""The base models: small networks for tables and digits, and the standard image classifiers at CIFAR size.

For example::

    model = build_model("lenet5", input_shape=(1, 28, 28), outputs=10)

Every model maps a float batch ``(B, *input_shape)`` to raw outputs (B, outputs): logits, or predictions in regression.
None uses in-place activations or dropout, so a forward-mode pass over the same batch sees the same function.

==========  ===========  =======  ==========
name        input        outputs  parameters
==========  ===========  =======  ==========
linear      (784,)            10       7,850
mlp64       (64,)             10       4,810
mlp         (1, 28, 28)       10   1,796,010
lenet5      (1, 28, 28)       10      44,426
allcnn_c    (3, 32, 32)       10   1,372,254
squeezenet  (3, 32, 32)       10     734,986
wrn16_8     (3, 32, 32)       10  10,961,370
resnet18    (3, 32, 32)       10  11,173,962
vgg16       (3, 32, 32)       10  14,728,266
wrn28_10    (3, 32, 32)      100  36,536,884
==========  ===========  =======  ==========
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from adalfl_lite.checks import unknown


def model_names() -> list[str]:
    """Return the names that :func:`build_model` knows."""
    return list(_MODELS)


def build_model(name: str, *, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Return a freshly initialised model in train mode; seed torch before the call to choose the initialisation.

    Args:
        name: one of :func:`model_names`.
        input_shape: the shape of one input, without the batch dimension. ``linear``, ``mlp64`` and ``mlp`` flatten
            any shape; the others take images (channels, height, width).
        outputs: the number of classes C, or of target variables K.

    Raises:
        ValueError: unknown name, an ``input_shape`` the model cannot take, or ``outputs`` below 1.
    """
    if name not in _MODELS:
        raise unknown("model", name, _MODELS)
    shape, (build, min_side) = tuple(input_shape), _MODELS[name]
    if not shape or min(shape) < 1:
        raise ValueError(f"input_shape={shape} must hold the positive sizes of one input, without the batch dimension")
    if min_side and (len(shape) != 3 or min(shape[1:]) < min_side):
        raise ValueError(
            f"input_shape={shape} does not suit {name!r}: it takes images (channels, height, width) of at least"
            f" {min_side} x {min_side} pixels"
        )
    if outputs < 1:
        raise ValueError(f"outputs={outputs} must be at least 1")
    return build(shape, outputs)


def _mlp(shape: tuple[int, ...], outputs: int, *, hidden: tuple[int, ...]) -> nn.Module:
    """Flatten, fully connected hidden layers with ReLU, a linear head."""
    sizes = (math.prod(shape), *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, units in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(inputs, units), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def _lenet5(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) in today's form: ReLU, max pooling, no padding; 28 x 28 leaves 16 maps of 4 x 4."""
    channels, *sides = shape
    height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * height * width, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, outputs),
    )


def _conv_bn_relu(inputs: int, units: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, units, kernel, stride, padding), nn.BatchNorm2d(units), nn.ReLU()]


def _allcnn_c(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """All-CNN-C (Springenberg et al. 2015) with batch normalisation in place of its dropout.

    The count of 1,372,254 identifies the variant: nine convolutions with biases (1,369,738 parameters), each of them,
    the one that makes the class scores included, followed by an affine BatchNorm (2,516 more).
    """
    return nn.Sequential(
        *(*_conv_bn_relu(shape[0], 96), *_conv_bn_relu(96, 96), *_conv_bn_relu(96, 96, stride=2)),
        *(*_conv_bn_relu(96, 192), *_conv_bn_relu(192, 192), *_conv_bn_relu(192, 192, stride=2)),
        *(*_conv_bn_relu(192, 192, padding=0), *_conv_bn_relu(192, 192, kernel=1, padding=0)),
        *(nn.Conv2d(192, outputs, 1), nn.BatchNorm2d(outputs)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).apply(_he_initialise)


def _vgg16(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """VGG-16 (Simonyan and Zisserman 2015), batch-normalised, with one linear layer on its 512 features."""
    layers: list[nn.Module] = []
    inputs = shape[0]
    for units, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            layers += _conv_bn_relu(inputs, units)
            inputs = units
        layers.append(nn.MaxPool2d(2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs))
    return nn.Sequential(*layers, *head).apply(_he_initialise)


def _resnet18(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """ResNet-18 (He et al. 2016) for small images: a 3 x 3 stem of stride 1, and no max pooling after it."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=outputs)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False).apply(_he_initialise)
    model.maxpool = nn.Identity()
    return _without_inplace(model)


def _squeezenet(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """SqueezeNet 1.0 (Iandola et al. 2016) for small images.

    The count of 734,986 identifies the variant: a 3 x 3 stem of 96 channels (729,034 parameters in all) and an affine
    BatchNorm after every convolution but the one that makes the class scores (5,952 more). With that the original's
    dropout, and the ReLU that keeps its class scores from being negative, are left out.
    """
    from torchvision.models import squeezenet1_0

    model = squeezenet1_0(num_classes=outputs)
    stem = nn.Conv2d(shape[0], 96, 3, padding=1).apply(_he_initialise)
    model.features[0] = nn.Sequential(stem, nn.BatchNorm2d(96))
    for fire in model.features[3:]:
        for part in ("squeeze", "expand1x1", "expand3x3") if hasattr(fire, "squeeze") else ():
            convolution = getattr(fire, part)
            setattr(fire, part, nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels)))
    model.classifier = nn.Sequential(model.classifier[1], nn.AdaptiveAvgPool2d(1))
    return _without_inplace(model)


class _WideBlock(nn.Module):
    """Pre-activation residual block: x + conv(relu(bn(conv(relu(bn(x)))))), projected where the width changes."""

    def __init__(self, inputs: int, units: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, units, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(units)
        self.conv2 = nn.Conv2d(units, units, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, units, 1, stride, bias=False) if inputs != units else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(hidden))))
        return residual + (x if self.shortcut is None else self.shortcut(hidden))


def _wide_resnet(shape: tuple[int, ...], outputs: int, *, depth: int, width: int) -> nn.Module:
    """WRN-depth-width (Zagoruyko and Komodakis 2016), without dropout: three groups of (depth - 4) / 6 blocks."""
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)]
    inputs = 16
    for units, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for block in range((depth - 4) // 6):
            layers.append(_WideBlock(inputs, units, stride if block == 0 else 1))
            inputs = units
    head = (nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, outputs))
    return nn.Sequential(*layers, *head).apply(_he_initialise)


def _he_initialise(module: nn.Module) -> None:
    """Draw convolution weights from N(0, 2 / fan_out) (He et al. 2015) and set their biases to 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _without_inplace(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


# How to build each model, and the smallest image side it takes; 0 marks models that flatten any shape.
_MODELS: dict[str, tuple[Callable[[tuple[int, ...], int], nn.Module], int]] = {
    "linear": (partial(_mlp, hidden=()), 0),
    "mlp64": (partial(_mlp, hidden=(64,)), 0),
    "mlp": (partial(_mlp, hidden=(1000, 1000)), 0),
    "lenet5": (_lenet5, 16),
    "allcnn_c": (_allcnn_c, 9),
    "squeezenet": (_squeezenet, 8),
    "wrn16_8": (partial(_wide_resnet, depth=16, width=8), 4),
    "resnet18": (_resnet18, 8),
    "vgg16": (_vgg16, 32),
    "wrn28_10": (partial(_wide_resnet, depth=28, width=10), 4),
}
