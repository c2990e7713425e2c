"""The figures show the numbers they are given, in the promised size, fonts and files."""

import doctest

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import analysis.plotting
from analysis.plotting import (
    PALETTE,
    colours,
    label,
    plain_ticks,
    plot_comparison,
    plot_learning_curves,
    save_figure,
    set_theme,
    theme,
)
from analysis.statistics import bootstrap_interval


@pytest.fixture(autouse=True)
def fresh_figures():
    with matplotlib.rc_context():
        yield
        plt.close("all")


def history(methods=("handcrafted", "adalfl"), seeds=5, steps=4):
    rng = np.random.default_rng(0)
    rows = [
        {"method": m, "seed": s, "step": 10 * t, "test_error": 1 / (1 + t + i) + rng.normal(0, 0.01)}
        for i, m in enumerate(methods)
        for s in range(seeds)
        for t in range(steps)
    ]
    return pd.DataFrame(rows)


def test_docstring_examples():
    assert doctest.testmod(analysis.plotting).failed == 0


def test_theme_sets_the_size_and_is_undone():
    before = dict(matplotlib.rcParams)
    with theme("column", aspect=0.5):
        assert plt.figure().get_size_inches().tolist() == [3.25, 1.625]
        assert matplotlib.rcParams["pdf.fonttype"] == 42
    assert dict(matplotlib.rcParams) == before
    set_theme(5.5)
    assert plt.figure().get_size_inches()[0] == 5.5
    with pytest.raises(ValueError, match="'page'"), theme("page"):
        pass
    with pytest.raises(ValueError, match="positive"):
        set_theme(-1)


def luminance(colour):
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_colours_show_on_white_and_differ():
    assert len(set(PALETTE)) == len(PALETTE)
    for colour in PALETTE:
        assert 1.05 / (luminance(colour) + 0.05) > 2, f"{colour} is too pale for a line on white"
    many = colours(f"m{i}" for i in range(len(PALETTE) + 1))
    assert many["m0"] == many[f"m{len(PALETTE)}"] == PALETTE[0]


def test_learning_curves_draw_means_and_intervals():
    frame = history()
    with theme("column"):
        ax = plot_learning_curves(frame)
    for i, name in enumerate(["handcrafted", "adalfl"]):
        runs = frame[frame.method == name]
        expected = runs.groupby("step").test_error.mean()
        line = ax.lines[i]
        assert line.get_xdata().tolist() == expected.index.tolist()
        assert line.get_ydata() == pytest.approx(expected.to_numpy())
        assert line.get_color() == PALETTE[i]
        low, high = bootstrap_interval(runs[runs.step == 10].test_error, resamples=999)
        band = ax.collections[i].get_paths()[0].vertices
        drawn = np.sort(np.unique(band[band[:, 0] == 10][:, 1]))
        assert (drawn[0], drawn[-1]) == pytest.approx((low, high))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Training step", "Test error")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["handcrafted", "adalfl"]


def test_legend_is_above_the_data_and_inside_the_figure():
    with theme("column"):
        ax = plot_learning_curves(history([f"a rather long method {i}" for i in range(5)]))
        ax.figure.draw_without_rendering()
        box = ax.get_legend().get_window_extent()
        assert box.y0 >= ax.bbox.y1 and box.x0 >= 0 and box.x1 <= ax.figure.bbox.x1 and box.y1 <= ax.figure.bbox.y1
        assert ax.bbox.height > 0.2 * ax.figure.bbox.height
    assert plot_learning_curves(history(), plt.figure().gca(), legend=False).get_legend() is None


def test_learning_curves_of_one_seed_and_chosen_methods():
    frame = history(seeds=1)
    ax = plot_learning_curves(frame, order=["adalfl"])
    assert len([line for line in ax.lines if len(line.get_xdata())]) == 1
    with pytest.raises(ValueError, match="no rows for method .'ml3'"):
        plot_learning_curves(frame, order=["ml3"])


def test_learning_curves_refuse_mixtures_and_warn_of_missing_runs():
    frame = history()
    with pytest.raises(ValueError, match="more than one row"):
        plot_learning_curves(pd.concat([frame.assign(task="digits"), frame.assign(task="wine")]))
    with pytest.raises(ValueError, match="lacks .'seed'"):
        plot_learning_curves(frame.drop(columns="seed"))
    with pytest.raises(ValueError, match="infinite"):
        plot_learning_curves(frame.replace(frame.test_error[3], np.inf))
    with pytest.warns(UserWarning, match="4 to 5 seeds"):
        plot_learning_curves(frame.drop(index=3))
    sparse = frame.assign(test_error=frame.test_error.where(frame.step % 20 == 0))  # measured at every second row
    assert plot_learning_curves(sparse, plt.figure().gca()).lines[0].get_xdata().tolist() == [0, 20]


def test_comparison_draws_every_seed_the_mean_and_its_interval():
    frame = history().query("step == 30").sample(frac=1, random_state=0)
    state = np.random.get_state()[1].copy()
    ax = plot_comparison(frame, order=["adalfl", "handcrafted"])
    assert (np.random.get_state()[1] == state).all()
    dots = ax.collections[0].get_offsets()
    assert sorted(dots[:, 0]) == pytest.approx(sorted(frame.test_error))
    values = frame[frame.method == "adalfl"].test_error.to_numpy()
    bar, mean = ax.lines[:2]
    assert mean.get_xdata()[0] == pytest.approx(values.mean())
    assert bar.get_xdata() == pytest.approx(bootstrap_interval(values))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["adalfl", "handcrafted"]
    assert ax.yaxis_inverted()
    heights = {s: [h % 1 for x, h in dots if x in set(frame[frame.seed == s].test_error)] for s in range(5)}
    assert all(len(h) == 2 and h[0] == pytest.approx(h[1]) for h in heights.values())  # pairs at equal heights


@pytest.mark.parametrize("suffix, magic", [(".pdf", b"%PDF"), (".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_saved_figures_are_whole_and_reproducible(tmp_path, suffix, magic):
    files = []
    for name in ("a", "b"):
        with theme("column"):
            ax = plot_learning_curves(history(), plt.figure().gca())
            files.append(save_figure(ax.figure, tmp_path / "figures" / f"{name}{suffix}"))
    first, second = (file.read_bytes() for file in files)
    assert first.startswith(magic) and first == second
    if suffix == ".pdf":
        assert b"/FontFile2" in first and b"/Type3" not in first  # TrueType, embedded
    assert sorted(p.name for p in files[0].parent.iterdir()) == [f"a{suffix}", f"b{suffix}"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    figure = plt.figure()
    path = save_figure(figure, tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a.jpeg"):
        save_figure(figure, tmp_path / "a.jpeg")

    def fail(part, **_):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError):
        save_figure(figure, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_labels():
    assert label("train_loss") == "Train loss" and label("seconds") == "Wall-clock time (s)"


def test_ticks_within_two_decades_are_plain_numbers():
    figure, (short, wide) = plt.subplots(1, 2)
    for ax, top in ((short, 3.0), (wide, 3e4)):
        ax.plot([0, 1], [0.4, top])
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    figure.canvas.draw()
    low, high = short.get_ylim()
    drawn = [t.get_text() for t in short.get_yticklabels() if low <= float(t.get_text()) <= high]
    assert drawn == ["0.5", "1", "2"]
    assert not any(text.get_text() for text in short.get_yticklabels(minor=True))
    assert "10^{4}" in wide.get_yticklabels()[-2].get_text() + wide.get_yticklabels()[-3].get_text()
