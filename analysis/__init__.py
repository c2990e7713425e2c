"""Diagnostics of losses and of training, for any model and any loss; nothing here needs the rest of this project.

By subject::

    loss_shapes      a loss over the prediction, its derivative, flatness, convexity and asymptotes
    effective_lr     ∇M = c ∇L + r: the learning rate a loss implies, over time and per layer
    label_smoothing  the smoothing a loss implies, and where it lets an example rest
    early_stopping   when a loss stops pushing, against the gap between training and validation
    gradients        norms, noise scale, agreement, and the influence of each example
    landscape        slices through the loss along lines, planes and trajectories; barriers
    curvature        eigenvalues, trace, spectral density, sharpness
    calibration      ECE and kin, reliability, temperature
    attribution      what a prediction rests on, and how far two models agree about it
    statistics       intervals, tests and effect sizes over seeds
    tables           a comparison in Markdown, LaTeX or HTML
    plotting         one look for every figure
    recorder         any of these while training, or from checkpoints

Models are left exactly as they were found, also after an error: the very same parameters, buffers, hooks, attributes
and modes. They are never copied. A loss is any callable (prediction, target) -> scalar; if it is a module it is left as
it was, too. Threads that run diagnostics at the same time wait for each other.

Arguments come in one order: the model, the losses, the data, then what is particular. Every name can be imported from
here, and each module is loaded when something of it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the headlines, which type checkers see; the rest are in their modules
    from analysis.attribution import integrated_gradients as integrated_gradients
    from analysis.calibration import calibration_scores as calibration_scores
    from analysis.curvature import top_eigenpairs as top_eigenpairs
    from analysis.early_stopping import stopping_point as stopping_point
    from analysis.effective_lr import effective_learning_rate as effective_learning_rate
    from analysis.gradients import gradient_norms as gradient_norms
    from analysis.gradients import influence as influence
    from analysis.label_smoothing import implied_label_smoothing as implied_label_smoothing
    from analysis.landscape import line as line
    from analysis.landscape import plane as plane
    from analysis.loss_shapes import loss_curves as loss_curves
    from analysis.plotting import plot_comparison as plot_comparison
    from analysis.recorder import Recorder as Recorder
    from analysis.statistics import compare_methods as compare_methods
    from analysis.statistics import summarise as summarise

NAMES = {
    "attribution": (
        "Attribution attribution_agreement compare_attributions grad_cam integrated_gradients occlusion "
        "plot_feature_attributions plot_image_attribution"
    ),
    "calibration": (
        "CalibrationScores calibration_scores fit_temperature plot_reliability predictions reliability_table"
    ),
    "curvature": (
        "Eigenpairs SpectralDensity Trace plot_spectral_density sharpness spectral_density top_eigenpairs trace"
    ),
    "early_stopping": "StoppingPoint plot_early_stopping push_and_gap relative_push stopping_point",
    "effective_lr": "EffectiveLR decompose effective_learning_rate implied_schedule plot_layer_schedule plot_schedule",
    "gradients": (
        "GradientNoise Influence gradient_cosine gradient_noise gradient_norms influence mean_gradients "
        "per_sample_gradients plot_layers"
    ),
    "label_smoothing": (
        "LabelSmoothing LogitStatistics PenultimateStatistics RestingPoint fit_label_smoothing "
        "implied_label_smoothing logit_gradient logit_statistics penultimate_statistics plot_label_smoothing "
        "plot_target_gradients resting_point target_gradients"
    ),
    "landscape": (
        "Line Plane Trajectory barrier interpolate line plane plot_line plot_plane plot_trajectory "
        "random_directions trajectory"
    ),
    "loss_shapes": "loss_curves plot_loss_curves shape_measures",
    "plotting": "plot_comparison plot_learning_curves save_figure set_theme theme",
    "recorder": "Recorder",
    "statistics": (
        "Improvement Interval PairedTest bootstrap_interval cohens_d compare_methods holm interquartile_mean "
        "paired_test probability_of_improvement summarise"
    ),
    "tables": "comparison_table render",
    "former": "adaptive_sharpness effective_learning_rate_by_layer gradient_noise_by_layer layer_integrated_gradients",
}
"""Every public name, under the module that has it."""

_WHERE = {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)  # noqa: PLE0605 -- a list of strings, made from the table


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, loaded when it is first asked for."""
    if name in _WHERE:
        value = getattr(import_module(f"analysis.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in NAMES:
        return import_module(f"analysis.{name}")
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names and modules."""
    return sorted({*globals(), *_WHERE, *NAMES})
