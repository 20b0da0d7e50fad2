"""Inverse problems beside posteriors in closed form: every method with every operator, on a Gaussian and on a mixture.

Data (2, 2, 4), noise of std 0.3 in y; 100 noise levels from 30 to 0.01, or as many evaluations. For ``COUNT`` draws of
x0 and y each a method makes ``DRAWS`` samples; errors of their mean (over the root of the trace of the posterior's
covariance), of their covariance (Frobenius, relative) and the sliced Wasserstein distance to as many exact samples are
given as mean and 95 % t-interval over the y. Calibration: ``TRIALS`` other x0 and y, ``RANKS`` samples each, of which
the share inside the central interval of 75 % is counted, with a binomial interval, and the ranks of four projections
are tested. Scores: how far a likelihood's score is from the exact one at each noise level.

``python -m benchmarks.inverse`` writes docs/inverse.md and docs/images/inverse.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import t as student
from tqdm.auto import tqdm

from scorelab import ScoreFn, sigmas, trajectory
from scorelab.distributions import Distribution, Gaussian, GaussianMixture
from scorelab.evaluation import calibration_ranks, uniformity
from scorelab.inverse import (
    DAPS,
    DDRM,
    DPS,
    Blur,
    Colourisation,
    Inpainting,
    LinearOperator,
    Matrix,
    Measurement,
    RePaint,
    Replacement,
    SuperResolution,
    dps,
    exact_posterior,
    moment_matching,
    pseudo_inverse,
)
from scorelab.plotting import figure
from scorelab.samplers import Ancestral, Sampler

SHAPE, NOISE, LOW, HIGH, LEVELS = (2, 2, 4), 0.3, 0.01, 30.0, 100
COUNT, DRAWS, TRIALS, RANKS, INNER = 6, 400, 240, 15, 2
DOCS = Path(__file__).parent.parent / "docs"
F64 = torch.float64


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def priors() -> dict[str, Distribution]:
    n = math.prod(SHAPE)
    basis = torch.linalg.qr(randn(n, n, seed=1)).Q
    cov = (basis * torch.logspace(-2, 0, n, dtype=F64)) @ basis.T
    return {
        "Gaussian": Gaussian(0.5 * randn(*SHAPE, seed=2), 0.5 * (cov + cov.T)),
        "mixture": GaussianMixture(randn(4, *SHAPE, seed=3), torch.tensor([0.2, 0.3, 0.3, 0.4], dtype=F64)),
    }


def operators() -> dict[str, LinearOperator]:
    return {
        "inpainting": Inpainting(randn(*SHAPE, seed=4) > 0),
        "colourisation": Colourisation(SHAPE),
        "super-resolution": SuperResolution(SHAPE, 2),
        "blur": Blur(torch.tensor([[0.2, 0.3, 0.1], [0.1, 0.2, 0.1]], dtype=F64), SHAPE),
        "compressed sensing": Matrix(randn(6, 16, seed=5) / 4, SHAPE),
    }


@dataclass(frozen=True)
class Method:
    """A posterior score, a function of score and measurement, or None, and the sampler and levels it runs with."""

    score: Callable[[ScoreFn, Measurement], ScoreFn] | None
    sampler: Callable[[Measurement], Sampler]
    levels: int = LEVELS
    only: type = LinearOperator


def spread(prior: Distribution) -> float:
    """The root mean square over dimensions of the prior's deviation, from its samples."""
    x = prior.sample(20_000, torch.Generator().manual_seed(0)).flatten(1)
    return float(x.var(0).mean().sqrt())


def methods(s: float) -> dict[str, Method]:
    """s: the data's standard deviation."""

    def ancestral(m: Measurement) -> Sampler:
        return Ancestral()

    return {
        "dps": Method(dps, ancestral),
        "pseudo_inverse": Method(lambda score, m: pseudo_inverse(score, m, s), ancestral),
        "pseudo_inverse, adaptive": Method(lambda score, m: pseudo_inverse(score, m, s, adaptive=True), ancestral),
        "moment_matching": Method(moment_matching, ancestral),
        "DPS(0.3)": Method(None, lambda m: DPS(m, 0.3)),
        "DDRM": Method(None, DDRM),
        "DAPS, sigma": Method(None, lambda m: DAPS(m, ode_steps=5), LEVELS // 5),
        "DAPS, data_std": Method(None, lambda m: DAPS(m, data_std=s)),
        "Replacement": Method(None, Replacement, only=Inpainting),
        "RePaint(4, 5)": Method(None, lambda m: RePaint(m, jump=4, resample=5), LEVELS // 4, Inpainting),
    }


def run(method: Method, prior: Distribution, m: Measurement, seed: int) -> tuple[torch.Tensor, int]:
    """A sample for each row of y, and the number of evaluations."""
    score = prior.score if method.score is None else method.score(prior.score, m)
    grid = sigmas.log_linear(method.levels, sigma_min=LOW, sigma_max=HIGH)
    x = HIGH * randn(len(m.y), *SHAPE, seed=seed)
    *_, last = trajectory(score, x, grid, method.sampler(m), generator=torch.Generator().manual_seed(seed))
    return last.x, last.nfe


def simulated(prior: Distribution, operator: LinearOperator, count: int, seed: int) -> tuple[torch.Tensor, Measurement]:
    """x0 and what is measured of it."""
    x0 = prior.sample(count, torch.Generator().manual_seed(seed))
    y = operator(x0)
    return x0, Measurement(operator, y + NOISE * randn(*y.shape, seed=seed + 1), NOISE)


def repeated(m: Measurement, times: int) -> Measurement:
    return Measurement(m.operator, m.y.repeat_interleave(times, 0), m.noise_std)


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, directions: int = 128) -> float:
    """The root mean square over directions of the 2-Wasserstein distance of the projections; x, y (N, D)."""
    along = torch.nn.functional.normalize(randn(x.shape[1], directions, seed=7), dim=0)
    return float(((x @ along).sort(0).values - (y @ along).sort(0).values).square().mean().sqrt())


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % t-interval."""
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def distances(x: torch.Tensor, exact: list[Distribution]) -> dict[str, tuple[float, float]]:
    """Errors of samples (COUNT * DRAWS, ...), with intervals over the y."""
    found: dict[str, list[float]] = {"mean": [], "covariance": [], "sliced": []}
    for k, e in enumerate(exact):
        mine = x[k * DRAWS : (k + 1) * DRAWS].flatten(1)
        many = e.sample(40_000, torch.Generator().manual_seed(k)).flatten(1)
        cov = many.T.cov()
        found["mean"].append(float((mine.mean(0) - many.mean(0)).norm() / cov.trace().sqrt()))
        found["covariance"].append(float((mine.T.cov() - cov).norm() / cov.norm()))
        found["sliced"].append(
            sliced_wasserstein(mine, e.sample(DRAWS, torch.Generator().manual_seed(50 + k)).flatten(1))
        )
    return {name: interval(values) for name, values in found.items()}


def calibration(x0: torch.Tensor, x: torch.Tensor) -> dict[str, object]:
    """Coverage of the central 75 % with a binomial interval, and the p-value of the ranks of four projections."""
    along = torch.linalg.qr(randn(x0[0].numel(), 4, seed=8)).Q
    ranks = calibration_ranks(x0.flatten(1) @ along, (x.flatten(1) @ along).reshape(TRIALS, RANKS, 4))
    inside = float(((ranks >= INNER) & (ranks <= RANKS - INNER)).double().mean(0)[0])
    half = 1.96 * math.sqrt(inside * (1 - inside) / TRIALS)
    # the least of four, by Bonferroni
    p = min(1.0, 4 * min(uniformity(ranks[:, k], RANKS) for k in range(4)))
    return {"coverage": (inside, half), "p": p}


def rows_of(prior: Distribution, operator: LinearOperator) -> dict[str, dict[str, object]]:
    """Every method's numbers, and those of exact draws."""
    _, few = simulated(prior, operator, COUNT, 10)
    truth, many = simulated(prior, operator, TRIALS, 20)
    exact = [exact_posterior(prior, few.rows(torch.tensor([k]))) for k in range(COUNT)]

    def drawn(m: Measurement, count: int) -> torch.Tensor:
        parts = (exact_posterior(prior, m.rows(torch.tensor([k]))) for k in range(len(m.y)))
        return torch.cat([e.sample(count, torch.Generator().manual_seed(1000 + k)) for k, e in enumerate(parts)])

    rows: dict[str, dict[str, object]] = {
        "exact draws": {**distances(drawn(few, DRAWS), exact), **calibration(truth, drawn(many, RANKS)), "nfe": 0}
    }
    for name, method in methods(spread(prior)).items():
        if isinstance(operator, method.only):
            x, nfe = run(method, prior, repeated(few, DRAWS), 30)
            ranked, _ = run(method, prior, repeated(many, RANKS), 40)
            rows[name] = {**distances(x, exact), **calibration(truth, ranked), "nfe": nfe}
    return rows


def score_errors(prior: Distribution) -> dict[str, dict[str, list[float]]]:
    """||g - g*|| / ||g*|| of likelihood scores at each noise level, x from the blurred posterior: mean and half
    interval over operators and y."""
    s, levels = spread(prior), torch.logspace(math.log10(LOW), math.log10(HIGH), 13, dtype=F64).tolist()
    made = {name: m.score for name, m in methods(s).items() if m.score is not None}
    found: dict[str, dict[str, list[float]]] = {name: {"sigma": levels, "mean": [], "half": []} for name in made}
    for sigma in levels:
        values: dict[str, list[float]] = {name: [] for name in made}
        for operator in operators().values():
            _, m = simulated(prior, operator, COUNT, 10)
            for k in range(COUNT):
                one = m.rows(torch.tensor([k]))
                exact = exact_posterior(prior, one)
                x = exact.sample(100, torch.Generator().manual_seed(k)) + sigma * randn(100, *SHAPE, seed=k)
                free, right = prior.score(x, sigma), exact.score(x, sigma)
                for name, make in made.items():
                    off = make(prior.score, one)(x, torch.tensor(sigma, dtype=F64)) - right
                    values[name].append(float(off.norm() / (right - free).norm()))
        for name in made:
            mean, half = interval(values[name])
            found[name]["mean"].append(mean)
            found[name]["half"].append(half)
    return found


def cell(value: object) -> str:
    """A number with its interval."""
    assert isinstance(value, (tuple, list))
    mean, half = map(float, value)
    return f"{mean:.2g} ± {half:.1g}" if mean < 1e4 else "diverged"


def table(results: dict[str, dict[str, dict[str, object]]]) -> str:
    """Markdown: a line for each operator and method."""
    lines = [
        "| operator | method | mean | covariance | sliced Wasserstein | coverage of 75 % | p | NFE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for operator, rows in results.items():
        for name, row in rows.items():
            numbers = [cell(row[key]) for key in ("mean", "covariance", "sliced", "coverage")]
            p = f"{row['p']:.2g}" if float(row["p"]) > 1e-4 else "< 1e-4"  # type: ignore[arg-type]
            lines.append(f"| {operator} | {name} | " + " | ".join([*numbers, p, str(row["nfe"])]) + " |")
    return "\n".join(lines)


def plot(
    results: dict[str, dict[str, dict[str, dict[str, object]]]], scores: dict[str, dict[str, dict[str, list[float]]]]
) -> None:
    """inverse.png: above, scores by noise level; below, the error of the covariance, a point for each operator."""
    made, axes = figure(2, 2, size=4.6)
    for column, (name, found) in enumerate(scores.items()):
        ax = axes[0, column]
        for label, row in found.items():
            mean, half = torch.tensor(row["mean"]), torch.tensor(row["half"])
            (line,) = ax.loglog(row["sigma"], mean, "o-", markersize=3, label=label)
            ax.fill_between(
                row["sigma"], (mean - half).clamp_min(1e-12), mean + half, alpha=0.2, color=line.get_color()
            )
        ax.set(title=f"likelihood's score, {name}", xlabel="noise level", ylabel="relative distance to the exact one")
        ax.set_ylim(1e-8, 1e4)
        ax.legend(fontsize=7, loc="upper left")
    for column, (name, by_operator) in enumerate(results.items()):
        ax = axes[1, column]
        names = list(dict.fromkeys(method for rows in by_operator.values() for method in rows))
        for shift, (operator, rows) in enumerate(by_operator.items()):
            known = [(i + 0.12 * (shift - 2), rows[n]["covariance"]) for i, n in enumerate(names) if n in rows]
            places, values = zip(*known, strict=True)
            mean, half = torch.tensor(values).T
            lower = torch.minimum(half, 0.9 * mean)
            ax.errorbar(mean, places, xerr=torch.stack([lower, half]), fmt="o", markersize=3, lw=1, label=operator)
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.invert_yaxis()
        ax.set(xscale="log", xlim=(0.03, 300), title=f"error of the covariance, {name}", xlabel="relative error")
        ax.legend(fontsize=7)
    made.savefig(DOCS / "images" / "inverse.png")


def page(results: dict[str, dict[str, dict[str, dict[str, object]]]]) -> None:
    """The tables in docs/inverse.md, between its marks."""
    path, begin, end = DOCS / "inverse.md", "<!-- measured -->\n", "<!-- /measured -->"
    text = path.read_text() if path.is_file() else f"# Inverse problems\n\n{begin}{end}\n"
    head, rest = text.split(begin)
    tables = "".join(f"\n### {name}\n\n{table(rows)}\n" for name, rows in results.items())
    about = f"\nMeasured with torch {torch.__version__}, Python {platform.python_version()}.\n"
    path.write_text(head + begin + tables + about + "\n" + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only draw and write what was measured before")
    path = Path(__file__).parent / "results" / "inverse.json"
    if not parser.parse_args().plot:
        torch.set_num_threads(1)
        results = {
            name: {o: rows_of(prior, a) for o, a in tqdm(operators().items(), desc=name, unit="operator")}
            for name, prior in priors().items()
        }
        scores = {name: score_errors(prior) for name, prior in priors().items()}
        path.write_text(json.dumps({"results": results, "scores": scores}, indent=1) + "\n")
    known = json.loads(path.read_text())
    plot(known["results"], known["scores"])
    page(known["results"])


if __name__ == "__main__":
    main()
