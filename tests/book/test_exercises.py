"""The answers to the chapters' exercises, found by another route than the chapters take.

One test per chapter, named after it. ``check`` compares what it found with every ``answer_...`` that the chapter's last
stored build printed, none left out; what an answer claims without a number is tested beside it.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog, minimize_scalar
from scipy.special import expit, lambertw, log_softmax, ndtri, softmax
from scipy.stats import hypergeom

BOOK = Path(__file__).parents[2] / "book"


def check(chapter: str, found: dict[str, float], relative: float = 1e-3) -> None:
    """The answers that a chapter printed are those found here, and there are no others."""
    stored = json.loads((BOOK / "results" / f"{chapter}.json").read_text())
    answers = {name: value for name, value in stored.items() if name.startswith("answer_")}
    assert answers == pytest.approx({f"answer_{name}": value for name, value in found.items()}, rel=relative, abs=1e-9)


def exercises(chapter: str) -> list[str]:
    """The texts of a chapter's exercises, each with its answer and code, by a look at the source."""
    return re.split(r"^```\{admonition\} Exercise \d+$", (BOOK / f"{chapter}.md").read_text(), flags=re.MULTILINE)[1:]


CHAPTERS = sorted(path.stem for path in BOOK.glob("*.md") if exercises(path.stem))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_exercise_has_an_answer_that_is_computed_and_tested(chapter):
    assert f"test_{chapter}" in globals(), f"no test here for the exercises of {chapter}"
    for number, text in enumerate(exercises(chapter), 1):
        assert text.count(":::{dropdown} Answer") == 1, f"exercise {number}"
        code = "".join(re.findall(r"^```\{code-cell\}.*?\n:tags: \[hide-cell\]\n(.*?)^```$", text, re.M | re.S))
        assert "glue(" in code or "assert" in code, f"the answer to exercise {number} is not computed"


def test_learning_rate_scheduling():
    # 1: scales add up, and the same two alignments leave that of the sum open
    rng = np.random.default_rng(0)
    task, first, second = rng.normal(size=(3, 8))

    def scale(gradient):
        return gradient @ task / (task @ task)

    def alignment(gradient):
        return scale(gradient) * np.linalg.norm(task) / np.linalg.norm(gradient)

    assert scale(first) + scale(second) == pytest.approx(scale(first + second))
    residual = first - scale(first) * task
    plus, minus = task + residual, task - residual
    assert alignment(plus) == pytest.approx(alignment(minus)) and alignment(plus) < 0.999
    assert alignment(plus + minus) == pytest.approx(1)
    assert alignment(plus + plus) == pytest.approx(alignment(plus))

    # 2: the derivative of the loss after a step, by differences, in the scale of the loss and in that of the rate
    def after_a_step(optimizer, loss_factor, rate_factor):
        theta = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
        (loss_factor * (theta - torch.tensor([1.0, 2.0])).square().sum()).backward()
        optimizer([theta], lr=0.1 * rate_factor).step()
        return (theta.detach() - torch.tensor([3.0, -1.0])).square().sum().item()

    def derivatives(optimizer, h=1e-4):
        up, down = np.exp([h, -h])
        by_loss = after_a_step(optimizer, up, 1) - after_a_step(optimizer, down, 1)
        by_rate = after_a_step(optimizer, 1, up) - after_a_step(optimizer, 1, down)
        return by_loss / (2 * h), by_rate / (2 * h)

    by_loss, by_rate = derivatives(torch.optim.SGD)
    assert by_loss == pytest.approx(by_rate, rel=1e-6) and abs(by_rate) > 0.1
    by_loss, by_rate = derivatives(torch.optim.Adam)
    assert abs(by_loss) < 1e-5 < 0.1 < abs(by_rate)

    # 3: both second steps, as the answer writes them down
    alpha, momentum, g1, g2 = 0.1, 0.9, 2.0, -3.0
    for c1, c2 in ((4.0, 1.0), (2.0, 2.0)):
        moved = {}
        for through_the_loss in (True, False):
            theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.SGD([theta], lr=alpha, momentum=momentum)
            for g, c in ((g1, c1), (g2, c2)):
                before = theta.item()
                optimizer.param_groups[0]["lr"] = alpha if through_the_loss else alpha * c
                theta.grad = torch.full_like(theta, c * g if through_the_loss else g)
                optimizer.step()
            moved[through_the_loss] = before - theta.item()
        assert moved[True] == pytest.approx(alpha * (momentum * c1 * g1 + c2 * g2))
        assert moved[False] == pytest.approx(alpha * c2 * (momentum * g1 + g2))
        assert (moved[True] == pytest.approx(moved[False])) == (c1 == c2)
    check("learning_rate_scheduling", {})


def test_early_stopping():
    # 1: the derivative e^-z - 1/(1+z)^2 vanishes where 1 + z = e^(z/2), which Lambert's W solves
    z = -1 - 2 * lambertw(-np.exp(-0.5) / 2, -1).real
    difference = 1 - np.exp(-z) - z / (1 + z)

    # 2: every step of gradient descent shrinks the distance to the minimum by a factor
    rates = 0.01 * 5.0 * np.exp(-np.arange(5000) / 40) * 0.5
    end, filtered = 1 - np.prod(1 - rates), -np.expm1(-rates.sum())

    # 3: softmax regression on the same draws, its gradient written out
    torch.manual_seed(0)
    weight, bias = (p.detach().double().numpy() for p in torch.nn.Linear(2, 2).parameters())
    y = np.arange(100) % 2
    x = torch.randn(100, 2).double().numpy() + 4 * (y[:, None] - 0.5)
    norms, margins = [], []
    for _ in range(500):
        logits = x @ weight.T + bias
        margins.append(np.min((logits[:, 1] - logits[:, 0]) * (2 * y - 1)))
        delta = (softmax(logits, 1) - np.eye(2)[y]) / len(x)
        gradients = delta.T @ x, delta.sum(0)
        norms.append(np.sqrt(sum(np.sum(g**2) for g in gradients)))
        weight, bias = weight - 0.5 * gradients[0], bias - 0.5 * gradients[1]
    assert margins[0] < 0 < margins[-1] and margins[250] < margins[-1], "separable, and the margin keeps growing"
    found = {"filter": difference, "filter_at": z, "end": end, "filter_end": filtered, "norm": norms[-1] / norms[0]}
    check("early_stopping", found)


def test_label_smoothing():
    # 1: the loss of an example as a function of the margin alone, minimised
    def smoothed(margin, epsilon=0.1, classes=10):
        log_p = log_softmax([margin] + [0] * (classes - 1))
        return -(1 - epsilon) * log_p[0] - epsilon * log_p.mean()

    margin = minimize_scalar(smoothed, bounds=(0, 20), method="bounded", options={"xatol": 1e-8}).x

    # 2: the formula against differences, and the signs that the answer claims
    def slope(loss, p, classes, h=1e-6):
        def at(step):
            logits = np.log([p] + [(1 - p) / (classes - 1)] * (classes - 1))
            logits[0] += step
            return loss(softmax(logits))

        return (at(h) - at(-h)) / (2 * h)

    def squared(p):
        return (1 - p[0]) ** 2 + np.sum(p[1:] ** 2)

    def quadratic(p, a=0.7, b=1.3):
        return (-a * p[0] + np.sum(b * p[1:] ** 2)) / len(p)

    for classes in (2, 5, 10):
        for p in (0.05, 0.5, 0.9, 0.99):
            q = (1 - p) / (classes - 1)
            assert slope(quadratic, p, classes) == pytest.approx(p * (1 - p) / classes * (-0.7 - 2 * 1.3 * q), rel=1e-6)
            assert slope(quadratic, p, classes) < 0 and slope(squared, p, classes) < 0
    turning_up = slope(lambda p: (p[0] - 0.8) ** 2, 0.9, 10)
    falling = slope(lambda p: -p[0] - 2 * np.sqrt(p[1:]).sum(), 0.9, 10)
    assert turning_up > 0 and falling > 0, "either way a loss pulls back from 0.9"

    # 3: the focal loss's gradient written out, and least squares
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, 10, generator=draw, dtype=torch.float64).numpy()
    y = np.eye(10)[logits.argmax(1)]
    p = softmax(logits, 1)
    right = p.max(1, keepdims=True)
    slope_in_p = 2 * (1 - right) * np.log(right) - (1 - right) ** 2 / right
    gradient = slope_in_p * right * (y - p)
    regressors = np.stack([(p - y).ravel(), (y - 0.1).ravel()], 1)
    (scale, product), (residual,), *_ = np.linalg.lstsq(regressors, gradient.ravel(), rcond=None)
    assert (gradient[y == 1] < 0).all(), "no example is pulled back, so it rests at one"
    r2 = 1 - residual / np.sum(gradient**2)
    check("label_smoothing", {"margin": margin, "focal_epsilon": product / scale, "focal_r2": r2, "focal_rest": 1.0})


def test_comparison():
    # 1: all n signs alike, by counting; nine methods
    seeds = next(n for n in range(2, 20) if 9 * 2 / 2**n < 0.05)
    # 2: the mean of a maximum is that of its quantile function
    uniform = (np.arange(2_000_000) + 0.5) / 2_000_000
    curse = ndtri(uniform ** (1 / 7)).mean()
    # 3: 3 + 16500 / T trainings
    check(
        "comparison",
        {
            "smallest": 2 / 2**10,
            "seeds": seeds,
            "curse": curse,
            "iris": curse * (0.05 * 0.95 / 30) ** 0.5,
            "steps": 16_500,
            "cifar": 3 + 16_500 / 150_000,
        },
    )


def test_adalfl():
    # 1: the corner in closed form, and the two units' sum on a grid
    corner = 0.99 * np.log(2) / 10
    prediction = np.linspace(0, 1, 1001)
    softplus = np.logaddexp(0, 10 * (prediction - 0.5)) / 10 + np.logaddexp(0, 10 * (0.5 - prediction)) / 10
    minimum = prediction[softplus.argmin()]  # the linear parts γx of the two units cancel

    # 2: torch's own step, with and without a nudge to one entry of the gradient
    def second_step(nudge):
        theta = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        for gradient in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 0.1]).double() + nudge):
            theta.grad = gradient.double()
            optimizer.step()
        return theta.detach()

    moved = second_step(torch.tensor([1e-3, 0, 0])) - second_step(torch.zeros(3))
    assert moved[1] == moved[2] == 0
    nesterov = moved[0].item() / 1e-3 / -0.1

    # 3: outputs before and after a step against the validation gradient, with softmax regression written out
    rng = np.random.default_rng(1)
    inputs, held_out, weight = rng.normal(size=(5, 6)), rng.normal(size=(7, 6)), rng.normal(size=(3, 6))
    held_out[:, 4:] = 0
    inputs[0, :4] = 0
    inputs[2] = 2 * inputs[1]
    errors = softmax(held_out @ weight.T, 1) - np.eye(3)[np.arange(7) % 3]
    shift = np.linalg.norm(inputs @ (weight - 0.1 * errors.T @ held_out / 7).T - inputs @ weight.T, axis=1)
    assert shift[2] == pytest.approx(2 * shift[1])
    found = {"corner": corner, "minimum": minimum, "nesterov": nesterov, "orthogonal": shift[0] / np.linalg.norm(shift)}
    check("adalfl", found)


def test_what_the_loss_decides():
    # 1: both maxima by calculus: 4p(1-p)² at a third, p(1-p) at a half; the push by differences of the loss
    def push(loss, p, h=1e-6):
        up, down = (loss(1 / (1 + np.exp(-(np.log(p / (1 - p)) + step)))) for step in (h, -h))
        return -(up - down) / (2 * h)

    squared, absolute = push(lambda p: 2 * (1 - p) ** 2, 1 / 3), push(lambda p: 1 - p, 1 / 2)
    assert squared == pytest.approx(16 / 27) and absolute == pytest.approx(1 / 4)

    # 2: on a quadratic; plain weight decay would not do
    def ends(optimizer, factor):
        theta = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        optimizer = optimizer([theta])
        for _ in range(10):
            theta.grad = factor * torch.tensor([2.0, 0.5]) * theta.detach()
            optimizer.step()
        return theta.detach().numpy()

    def sgd(rate, decay):
        return lambda p: torch.optim.SGD(p, lr=rate, weight_decay=decay)

    assert ends(sgd(0.1, 0.4), 4) == pytest.approx(ends(sgd(0.4, 0.1), 1))
    assert ends(sgd(0.1, 0.4), 4) != pytest.approx(ends(sgd(0.4, 0.4), 1), rel=0.01)
    assert ends(torch.optim.Adam, 4) == pytest.approx(ends(torch.optim.Adam, 1), rel=1e-6)

    # 3: the quantile of the same draws
    quantile = np.quantile(np.random.default_rng(0).lognormal(sigma=1.0, size=100_000), 0.9)
    found = {"squared_at": 1 / 3, "squared": squared, "absolute_at": 1 / 2, "absolute": absolute, "quantile": quantile}
    check("what_the_loss_decides", {**found, "sgd_distance": 0, "adam_distance": 0})


def test_ml3():
    # 1: the sigmoid inverted, and its derivative
    flat = -np.log(999)

    # 2: the recursion solved: A_t = (1-α)^2t (A_0 - A*) + A*, with its limit A* = α / (2 - α)
    def expected(rate, steps):
        limit = rate / (2 - rate)
        return (1 - rate) ** (2 * steps) * (100 - limit) + limit

    one, many = (
        minimize_scalar(expected, bounds=(1e-4, 1), args=(n,), method="bounded", options={"xatol": 1e-9}).x
        for n in (1, 600)
    )
    ratio = expected(one, 600) / expected(many, 600)

    # 3: torch's own momentum, given one gradient and then none
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, travelled = torch.optim.SGD([theta], lr=1.0, momentum=0.9), []
    for step in range(400):
        theta.grad = torch.full_like(theta, -1.0 if step == 0 else 0.0)
        optimizer.step()
        travelled.append(theta.item())
    seen = np.array(travelled) / travelled[-1]
    found = {"flat": flat, "curvature": 0.001 * 0.999, "one_step": one, "many_steps": many, "rate_ratio": one / many}
    found |= {"loss_ratio": ratio, "rollout": 1 + int(np.argmax(seen >= 0.9)), "seen": seen[19]}
    check("ml3", found)


def test_cost():
    results = BOOK.parent / "benchmarks" / "results"
    (measured,) = (
        row["time_ratio"]
        for row in json.loads((results / "step.json").read_text())["rows"]
        if (row["model"], row["engine"]) == ("allcnn_c", "functional")
    )
    # 2: the normal equations
    rows = json.loads((results / "seeds.json").read_text())["rows"]
    count, time = (np.array([row[key] for row in rows]) for key in ("seeds", "seconds_per_step"))
    each = np.sum((count - count.mean()) * time) / np.sum((count - count.mean()) ** 2)
    fixed = time.mean() - each * count.mean()
    alone = rows[0]["alone_seconds_per_step"]
    assert each < alone
    # 1 and 3: counted by hand: eight layers; 2500 meta steps and nine rehearsals of 300, then 3000 steps
    found = {"plain": 3 * 8 - 1, "double": 8 * 8 - 3, "measured": measured}
    found |= {"fixed": 1000 * fixed, "each": 1000 * each, "half": fixed / each, "alone": 1000 * alone}
    check("cost", {**found, "initialisation": 7500 + 2700, "runs": (7500 + 2700 + 9000) / 3000})


def test_learned_losses():
    # 1: where the slope, by differences, has fallen to a half and to a hundredth
    def softplus(z):
        return np.logaddexp(0, z)

    def loss_at(slope, h=1e-5):
        z = brentq(lambda z: (softplus(z + h) - softplus(z - h)) / (2 * h) - slope, -20, 20)
        return softplus(z)

    # 2: the mean probability does not depend on the logits; the mean prediction does
    rng = np.random.default_rng(0)
    logits, moved = rng.normal(size=(2, 7, 10))
    assert softmax(logits, 1).mean(1) == pytest.approx(softmax(moved, 1).mean(1))
    assert logits.mean(1) != pytest.approx(moved.mean(1))

    # 3: ℓ(1, p) = -C log p and ℓ(0, p) = 0 is cross-entropy, so its slope is what it takes
    def steepness(p, h=1e-6):
        return 10 * (np.log(p + h) - np.log(p - h)) / (2 * h)

    found = {"half": loss_at(0.5), "hundredth": loss_at(0.01), "middle": steepness(0.5), "mistake": steepness(0.01)}
    check("learned_losses", found)


def test_gradients():
    # 1: the influence by the chain rule of a linear model, against differences in the scale of the loss
    rng = np.random.default_rng(0)
    x, y, x_meta, y_meta = rng.normal(size=(4, 6))
    theta, rate, phi = 0.3, 0.1, 3.0
    v = np.mean(2 * (theta * x_meta - y_meta) * x_meta)
    influences = phi * 2 * (theta * x - y) / len(x) * (-rate * x * v)

    def to_first_order(scale):
        return -rate * scale * np.mean(2 * (theta * x - y) * x) * v

    assert (to_first_order(phi + 1) - to_first_order(phi)) == pytest.approx(np.sum(influences) / phi)

    # 2: many labels drawn, and the smoothing that gives their frequencies
    labels = rng.integers(0, 9, size=400_000) + 1
    drawn = np.where(rng.random(len(labels)) < 0.2, labels, 0)
    frequency = np.bincount(drawn, minlength=10) / len(drawn)
    assert 10 * frequency[1:].mean() == pytest.approx(0.222, abs=0.002)
    check("gradients", {"epsilon": 10 * 0.2 / 9})


def test_loss_prediction():
    # 1: scores a margin apart for each of 99 neighbours, by linear programming; or logarithms
    neighbours = np.eye(99, 100, k=1) - np.eye(99, 100)
    objective = np.eye(100)[99] - np.eye(100)[0]
    ladder = linprog(objective, A_ub=-neighbours, b_ub=-np.ones(99), bounds=(None, None))
    losses = np.arange(1.0, 101.0)
    p = losses / (losses + losses[:, None])
    assert expit(np.log(losses) - np.log(losses)[:, None]) == pytest.approx(p)

    # 2: both expectations, minimised over the difference of the scores
    chances, first = np.array([0.6, 0.4]), np.array([1.0, 9.0])
    share = first / (first + 2)

    def divergence(gap):
        q = expit(gap)
        return chances @ (share * np.log(share / q) + (1 - share) * np.log((1 - share) / (1 - q)))

    gap = minimize_scalar(divergence, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x
    gaps = np.linspace(-3, 3, 601)
    margin = [chances @ np.maximum(0, 1 - np.sign(first - 2) * each) for each in gaps]
    assert gaps[np.argmin(margin)] == pytest.approx(-1) and gap > 0
    assert chances @ first > 2 * 2

    # 3: the score difference at which q is p
    def best(a, b):
        return minimize_scalar(lambda d: -(a * np.log(expit(d)) + b * np.log(expit(-d))), bracket=(-5, 5)).x

    assert best(3000, 1000) == pytest.approx(best(3, 1), abs=1e-5)
    check(
        "loss_prediction",
        {
            "range_margin": ladder.fun,
            "range_divergence": np.ptp(np.log(losses)),
            "noisy_gap": gap,
            "mean_loss": chances @ first,
            "gap": best(3, 1),
            "gap_floor": best(13, 11),
        },
    )


def test_other_losses():
    # 1: in p alone, up to a factor
    p = np.linspace(0.01, 0.99, 50)
    symmetric = -0.1 * np.log(p) + 4 * (1 - p)
    epsilon = np.linalg.lstsq(np.stack([-np.log(p), 1 - p], 1), symmetric, rcond=None)[0]

    # 2: the sum over labels, at the ends and between
    def summed(p, q=0.7):
        return np.sum((1 - p**q) / q)

    low, high = summed(np.full(10, 0.1)), summed(np.eye(10)[0])
    between = [summed(p) for p in np.random.default_rng(0).dirichlet(np.ones(10), 500)]
    assert low < min(between) and max(between) < high

    # 3: a Newton step by hand
    check(
        "other_losses",
        {"poly_epsilon": epsilon[1] / epsilon[0], "sum_low": low, "sum_high": high, "newton_factor": 1 / 2.1},
    )


def test_landscapes():
    # 1: the Hessian by differences, at both minima
    def loss(w):
        return 0.5 * (w[1] * max(w[0], 0) - 1) ** 2

    def largest_eigenvalue(w, h=1e-4):
        unit = h * np.eye(2)

        def second(a, b):
            return (loss(w + a + b) - loss(w + a - b) - loss(w - a + b) + loss(w - a - b)) / (4 * h**2)

        return np.linalg.eigvalsh([[second(a, b) for b in unit] for a in unit])[-1]

    factor = largest_eigenvalue(np.array([10.0, 0.1])) / largest_eigenvalue(np.array([1.0, 1.0]))

    # 2: where a root of the recurrence's polynomial leaves the unit circle
    def outside(curvature):
        return np.abs(np.roots([1, -(1 + 0.9 - 0.01 * curvature), 0.9])).max() - 1

    check("landscapes", {"factor": factor, "limit": brentq(outside, 300, 500)})


def test_attribution():
    # 1: the integral by the midpoint rule, and the falls of the output
    def f(x):
        return max(x.sum() - 1, 0)

    t = (np.arange(10_000) + 0.5) / 10_000
    integrated = np.mean(2 * t > 1)
    occluded = f(np.ones(2)) - f(np.array([0.0, 1.0]))
    assert 2 * integrated == pytest.approx(f(np.ones(2)) - f(np.zeros(2))) and 2 * occluded > 1.5

    # 2: the six of the other are a draw without replacement
    def overlap(pixels):
        return hypergeom(pixels, 6, 6).mean() / 6

    check(
        "attribution",
        {"integrated": integrated, "occlusion": occluded, "ink": overlap(32), "all": overlap(64)},
    )
