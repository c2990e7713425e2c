"""What the measured models are called in tables, and whose engines ours are timed beside."""

MODELS = {
    "mlp64": "MLP 64-64-10",
    "lenet5": "LeNet-5",
    "allcnn_c": "AllCNN-C",
    "resnet18": "ResNet-18",
    "wrn16_8": "WRN-16-8",
}
PEERS = ["functional", "higher", "torchopt"]
