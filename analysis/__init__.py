"""Diagnostics of losses and of training, for any model and any loss; nothing here needs the rest of this project.

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
"""

from analysis.attribution import (
    Attribution,
    attribution_agreement,
    compare_attributions,
    grad_cam,
    integrated_gradients,
    layer_integrated_gradients,
    occlusion,
    plot_feature_attributions,
    plot_image_attribution,
)
from analysis.calibration import (
    CalibrationScores,
    calibration_scores,
    fit_temperature,
    plot_reliability,
    predictions,
    reliability_table,
)
from analysis.curvature import (
    Eigenpairs,
    SpectralDensity,
    Trace,
    adaptive_sharpness,
    plot_spectral_density,
    sharpness,
    spectral_density,
    top_eigenpairs,
    trace,
)
from analysis.early_stopping import StoppingPoint, plot_early_stopping, push_and_gap, relative_push, stopping_point
from analysis.effective_lr import (
    EffectiveLR,
    decompose,
    effective_learning_rate,
    effective_learning_rate_by_layer,
    implied_schedule,
    plot_layer_schedule,
    plot_schedule,
)
from analysis.gradients import (
    GradientNoise,
    Influence,
    gradient_cosine,
    gradient_noise,
    gradient_noise_by_layer,
    gradient_norms,
    influence,
    mean_gradients,
    per_sample_gradients,
    plot_layers,
)
from analysis.label_smoothing import (
    LabelSmoothing,
    LogitStatistics,
    PenultimateStatistics,
    RestingPoint,
    fit_label_smoothing,
    implied_label_smoothing,
    logit_gradient,
    logit_statistics,
    penultimate_statistics,
    plot_label_smoothing,
    plot_target_gradients,
    resting_point,
    target_gradients,
)
from analysis.landscape import (
    Line,
    Plane,
    Trajectory,
    barrier,
    interpolate,
    line,
    plane,
    plot_line,
    plot_plane,
    plot_trajectory,
    random_directions,
    trajectory,
)
from analysis.loss_shapes import loss_curves, plot_loss_curves, shape_measures
from analysis.plotting import plot_comparison, plot_learning_curves, save_figure, set_theme, theme
from analysis.recorder import Recorder
from analysis.statistics import (
    Improvement,
    Interval,
    PairedTest,
    bootstrap_interval,
    cohens_d,
    compare_methods,
    holm,
    interquartile_mean,
    paired_test,
    probability_of_improvement,
    summarise,
)
from analysis.tables import comparison_table, render

__all__ = [
    "Attribution",
    "CalibrationScores",
    "EffectiveLR",
    "Eigenpairs",
    "GradientNoise",
    "Improvement",
    "Influence",
    "Interval",
    "LabelSmoothing",
    "Line",
    "LogitStatistics",
    "PairedTest",
    "PenultimateStatistics",
    "Plane",
    "Recorder",
    "RestingPoint",
    "SpectralDensity",
    "StoppingPoint",
    "Trace",
    "Trajectory",
    "adaptive_sharpness",
    "attribution_agreement",
    "barrier",
    "bootstrap_interval",
    "calibration_scores",
    "cohens_d",
    "compare_attributions",
    "compare_methods",
    "comparison_table",
    "decompose",
    "effective_learning_rate",
    "effective_learning_rate_by_layer",
    "fit_label_smoothing",
    "fit_temperature",
    "grad_cam",
    "gradient_cosine",
    "gradient_noise",
    "gradient_noise_by_layer",
    "gradient_norms",
    "holm",
    "implied_label_smoothing",
    "implied_schedule",
    "influence",
    "integrated_gradients",
    "interpolate",
    "interquartile_mean",
    "layer_integrated_gradients",
    "line",
    "logit_gradient",
    "logit_statistics",
    "loss_curves",
    "mean_gradients",
    "occlusion",
    "paired_test",
    "penultimate_statistics",
    "per_sample_gradients",
    "plane",
    "plot_comparison",
    "plot_early_stopping",
    "plot_feature_attributions",
    "plot_image_attribution",
    "plot_label_smoothing",
    "plot_layer_schedule",
    "plot_layers",
    "plot_learning_curves",
    "plot_line",
    "plot_loss_curves",
    "plot_plane",
    "plot_reliability",
    "plot_schedule",
    "plot_spectral_density",
    "plot_target_gradients",
    "plot_trajectory",
    "predictions",
    "probability_of_improvement",
    "push_and_gap",
    "random_directions",
    "relative_push",
    "reliability_table",
    "render",
    "resting_point",
    "save_figure",
    "set_theme",
    "shape_measures",
    "sharpness",
    "spectral_density",
    "stopping_point",
    "summarise",
    "target_gradients",
    "theme",
    "top_eigenpairs",
    "trace",
    "trajectory",
]
