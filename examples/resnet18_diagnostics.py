"""The diagnostics on a model and a loop of your own: torchvision's ResNet-18, trained a few steps on random images.

    python examples/resnet18_diagnostics.py figures

takes well under a minute on a CPU and saves five figures to the folder ``figures``. Nothing in it knows how a loss is
learned: give another model, data or loss to the same functions.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from analysis.curvature import plot_spectral_density, sharpness, spectral_density, top_eigenpairs
from analysis.gradients import gradient_cosine, gradient_norms, plot_layers
from analysis.landscape import barrier, interpolate, line, plane, plot_line, plot_plane, plot_trajectory, trajectory
from analysis.loss_shapes import loss_curves, plot_loss_curves
from analysis.plotting import save_figure, theme


def smoothed(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss to look at: cross-entropy with smoothed labels. Any (prediction, target) -> scalar will do."""
    return F.cross_entropy(prediction, target, label_smoothing=0.1)


def main(folder: Path, images: int = 8, size: int = 32, steps: int = 4, points: int = 5, nodes: int = 6) -> None:
    """Train ``steps`` steps on ``images`` random images of ``size`` pixels, and save the figures.

    The plane has ``points`` positions per axis, the lines twice as many; the spectra take ``nodes`` Lanczos steps.
    """
    torch.manual_seed(0)
    model = resnet18(weights=None, num_classes=10)
    batch, valid = ((torch.randn(images, 3, size, size), torch.randint(10, (images,))) for _ in range(2))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    checkpoints = [copy.deepcopy(model.state_dict())]
    for _ in range(steps):
        optimizer.zero_grad()
        smoothed(model(batch[0]), batch[1]).backward()
        optimizer.step()
        checkpoints.append(copy.deepcopy(model.state_dict()))

    # After so few steps the running statistics of BatchNorm are far from the batch's: use the batch's.
    at = {"batchnorm": "train"}
    axis = np.linspace(-1, 1, 2 * points - 1)
    pair = top_eigenpairs(model, smoothed, batch, tolerance=0.05, **at)
    print(f"largest eigenvalue of the Hessian  {pair.values[0]:.3g}")
    print(f"sharpness, adaptive sharpness      {sharpness(model, smoothed, batch, **at):.3g}", end=", ")
    print(f"{sharpness(model, smoothed, batch, adaptive=True, **at):.3g}")
    print(f"gradient cosine, training and new  {gradient_cosine(model, smoothed, batch, valid):.3g}")
    whole = interpolate(
        model, smoothed, batch, checkpoints[0], checkpoints[-1], positions=np.linspace(0, 1, points), **at
    )
    print(f"barrier, first and last checkpoint {barrier(whole):.3g}")

    with theme("column"):
        plot_loss_curves(loss_curves(smoothed), plt.figure().gca())
        save_figure(plt.gcf(), folder / "loss.png")

        plot_line(line(model, smoothed, batch, positions=axis, **at), plt.figure().gca(), label="random direction")
        plot_line(
            line(model, smoothed, batch, pair.vectors[0], positions=axis, **at), plt.gca(), label="top eigenvector"
        )
        save_figure(plt.gcf(), folder / "lines.png")

        path = trajectory(model, checkpoints)
        x, y = path.grid(points)
        around = plane(model, smoothed, batch, path.directions, x=x, y=y, origin=path.origin, progress=True, **at)
        plot_plane(around, plt.figure().gca())
        plot_trajectory(path, plt.gca())
        save_figure(plt.gcf(), folder / "trajectory.png")

        plt.figure()
        for matrix, label in (("hessian", "Hessian"), ("ggn", "Gauss-Newton")):
            spectrum = spectral_density(model, smoothed, batch, matrix=matrix, nodes=nodes, repeats=1, **at)
            plot_spectral_density(spectrum, plt.gca(), label=label)
        save_figure(plt.gcf(), folder / "spectrum.png")

    with theme("column", aspect=1.6):
        plot_layers(gradient_norms(model, smoothed, batch), plt.figure().gca(), log=False)
        save_figure(plt.gcf(), folder / "gradients.png")
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to save the figures; made if missing")
    for name, default in (("images", 8), ("size", 32), ("steps", 4), ("points", 5), ("nodes", 6)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    main(**vars(parser.parse_args()))
