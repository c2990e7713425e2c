"""One small instance of every family of classifiers in torchvision, and of the transformers in torch, in float64."""

import copy
from functools import cache

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vgg import VGG

from tests.trust.reference import ENGINES, Problem, Refusals, check, images, judge_all, sequences

pytestmark = pytest.mark.slow

LABEL = "steps of architectures"
FEWER = ("forward", "unrolled")
"""The engines for what is slow."""


def small_head(width):
    """In place of AlexNet's and VGG's, which have a hundred million weights."""
    return nn.Sequential(
        nn.Linear(width, 8), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(True), nn.Linear(8, 4)
    )


def emptied(build):
    """Built without memory for the weights; what is left of it when the head is replaced gets some."""
    with torch.device("meta"):
        model = build()
    model.classifier = nn.Identity()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.0)
    return model


def alexnet():
    model = emptied(lambda: tv.alexnet(num_classes=4))
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), small_head(256)
    return model


def vgg(norm):
    def make():
        layers, width = [], 3
        for out in (4, "M", 8, "M", 8, 8, "M"):
            if out == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(width, out, 3, padding=1), *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU(True)]
            width = out
        features = nn.Sequential(*layers)
        model = emptied(lambda: VGG(nn.Identity(), num_classes=4, init_weights=False))
        model.features, model.avgpool, model.classifier = features, nn.AdaptiveAvgPool2d(2), small_head(32)
        return model

    return make


def resnet(block, **options):
    return lambda: ResNet(block, [1, 1, 1, 1], num_classes=4, **options)


def mobilenet_v2():
    return tv.MobileNetV2(4, 0.25, [[1, 16, 1, 1], [6, 32, 2, 2]], 4)


def mobilenet_v3():
    given = [(8, 3, 8, 8, True, "RE", 2, 1), (8, 3, 16, 8, False, "RE", 1, 1), (8, 5, 16, 16, True, "HS", 2, 1)]
    blocks = [InvertedResidualConfig(*block, 1.0) for block in given]
    return MobileNetV3(blocks, 16, num_classes=4)


def efficientnet():
    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0), MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0)]
    return EfficientNet(blocks, dropout=0.2, stochastic_depth_prob=0.2, num_classes=4)


def efficientnet_v2():
    blocks = [FusedMBConvConfig(2, 3, 1, 8, 8, 2), MBConvConfig(4, 3, 2, 8, 16, 1)]
    return EfficientNet(blocks, dropout=0.2, stochastic_depth_prob=0.2, num_classes=4, last_channel=32)


def regnet(ratio):
    def make():
        sizes = BlockParams.from_init_params(depth=6, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=ratio)
        return RegNet(sizes, num_classes=4, stem_width=8)

    return make


def convnext():
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.2, layer_scale=0.5, num_classes=4)


def vit():
    return tv.VisionTransformer(16, 8, 2, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=4)


def swin(**options):
    return lambda: SwinTransformer(
        [4, 4], 8, [2, 2], [2, 4], [2, 2], stochastic_depth_prob=0.2, dropout=0.1, num_classes=4, **options
    )


def maxvit():
    return tv.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, stochastic_depth_prob=0.2, num_classes=4)


class Translator(nn.Module):
    """All of ``nn.Transformer``."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, 0.1, batch_first=True)

    def forward(self, x):
        source = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=x.dtype)
        return self.head(self.transformer(source, source[:, :2], tgt_mask=mask).mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, nn.LayerNorm(8), enable_nested_tensor=False)

    def forward(self, x):
        padded = torch.arange(x.shape[1]) >= torch.arange(len(x))[:, None] % 3 + 2
        return self.head(self.layers(self.embed(x), src_key_padding_mask=padded).mean(1))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.1, activation="gelu"), 2)

    def forward(self, x):
        h = self.embed(x).transpose(0, 1)
        return self.head(self.layers(h, torch.tanh(h)).mean(0))


# name: (model, side of the images, engines)
MODELS = {
    "AlexNet": (alexnet, 63, FEWER),
    "VGG": (vgg(norm=False), 16, ENGINES),
    "VGG with BatchNorm": (vgg(norm=True), 16, ENGINES),
    "ResNet": (resnet(BasicBlock), 16, FEWER),
    "ResNet with bottlenecks": (resnet(Bottleneck), 16, FEWER),
    "ResNeXt": (resnet(Bottleneck, groups=4, width_per_group=4), 16, FEWER),
    "wide ResNet": (resnet(Bottleneck, width_per_group=16), 16, FEWER),
    "DenseNet": (lambda: DenseNet(4, (2, 2), 8, 2, 0.2, num_classes=4), 16, ENGINES),
    "GoogLeNet": (lambda: tv.GoogLeNet(4, aux_logits=False, init_weights=False), 32, FEWER),
    "Inception v3": (lambda: tv.Inception3(4, aux_logits=False, init_weights=False), 75, FEWER),
    "MobileNet v2": (mobilenet_v2, 16, ENGINES),
    "MobileNet v3": (mobilenet_v3, 16, ENGINES),
    "EfficientNet": (efficientnet, 16, ENGINES),
    "EfficientNet v2": (efficientnet_v2, 16, ENGINES),
    "ShuffleNet v2": (lambda: ShuffleNetV2([2, 1, 1], [4, 8, 16, 16, 32], num_classes=4), 32, ENGINES),
    "SqueezeNet 1.0": (lambda: tv.SqueezeNet("1_0", 4), 32, FEWER),
    "SqueezeNet 1.1": (lambda: tv.SqueezeNet("1_1", 4), 32, FEWER),
    "MNASNet": (lambda: tv.MNASNet(0.1, 4), 32, FEWER),
    "RegNet X": (regnet(None), 16, ENGINES),
    "RegNet Y": (regnet(0.25), 16, ENGINES),
    "ConvNeXt": (convnext, 16, ENGINES),
    "vision transformer": (vit, 16, ENGINES),
    "Swin": (swin(), 32, ENGINES),
    "Swin v2": (swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 32, ENGINES),
    "MaxVit": (maxvit, 32, FEWER),
    "nn.Transformer": (Translator, None, ENGINES),
    "nn.TransformerEncoder": (Encoder, None, ENGINES),
    "nn.TransformerDecoder": (Decoder, None, ENGINES),
}

FAMILIES = {
    "alexnet": "AlexNet", "convnext": "ConvNeXt", "densenet": "DenseNet", "efficientnet": "EfficientNet",
    "googlenet": "GoogLeNet", "inception": "Inception v3", "maxvit": "MaxVit", "mnasnet": "MNASNet",
    "mobilenetv2": "MobileNet v2", "mobilenetv3": "MobileNet v3", "regnet": "RegNet X", "resnet": "ResNet",
    "shufflenetv2": "ShuffleNet v2", "squeezenet": "SqueezeNet 1.0", "swin_transformer": "Swin", "vgg": "VGG",
    "vision_transformer": "vision transformer",
}  # fmt: skip
"""Module of torchvision.models -> one of the above."""


@cache
def prototype(name):
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def problem(name, training):
    side = MODELS[name][1]

    def batches(seed):
        if side is None:
            return sequences(seed, count=3, length=4)
        return images(seed, count=3, channels=3, size=side)

    return Problem(
        lambda: copy.deepcopy(prototype(name)),
        batches=batches,
        training=training,
        warm=0,
        steps=2 if "shared" in MODELS[name][2] else 1,
    )


REFUSED: Refusals = {}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_is_trained_right_or_refused(name, training, counts):
    verdicts = judge_all(problem(name, training), counts, LABEL, MODELS[name][2])
    check(name, verdicts, REFUSED.get(name))


def test_every_family_of_torchvisions_classifiers_is_tried():
    builders = [tv.get_model_builder(name) for name in tv.list_models(module=tv)]
    assert {builder.__module__.removeprefix("torchvision.models.") for builder in builders} == FAMILIES.keys()
    assert {*FAMILIES.values()} <= MODELS.keys() and REFUSED.keys() <= MODELS.keys()
