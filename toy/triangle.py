"""Score, eps, x0 and v of one model at one point, converted into each other."""

from __future__ import annotations

import torch

from scorelab.plotting import extent_of, figure, points
from scorelab.predictions import EPS, SCORE, X0, V, convert
from toy.common import Gallery, options, parse

DEFAULT = ("ring",)
FORMS = {"score": SCORE, "eps": EPS, "x0": X0, "v": V}


def draw(gallery: Gallery, names: tuple[str, ...] = DEFAULT) -> None:
    """triangle_TARGET.png; metrics.json gets all twelve conversions and the largest relative disagreement."""
    numbers = {}
    for name in names:
        trained = gallery.trained(name)
        sigma = torch.tensor(0.6 * trained.data_std)
        x = trained.distribution.sample(1, torch.Generator().manual_seed(8))
        x = x + sigma * torch.randn(1, 2, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            model = trained.model
            own = {
                "score": model(x, sigma),
                "eps": model.eps(x, sigma),
                "x0": model.denoise(x, sigma),
                "v": model.v(x, sigma),
            }
        table, worst = {}, 0.0
        for source in FORMS:
            for goal in FORMS:
                found = convert(own[source], x, sigma, FORMS[source], FORMS[goal])
                table[f"{source} -> {goal}"] = found[0].tolist()
                worst = max(worst, float((found - own[goal]).norm() / own[goal].norm()))
        # room for the point and both arrows, which may lie outside the data
        left, right, bottom, top = extent_of(trained.distribution)
        ends = torch.cat([x, x + sigma * own["eps"], own["x0"]])
        low, high = ends.amin(0) - 0.3 * sigma, ends.amax(0) + 0.3 * sigma
        extent = (
            min(left, float(low[0])),
            max(right, float(high[0])),
            min(bottom, float(low[1])),
            max(top, float(high[1])),
        )
        made, axes = figure(2, size=4.2)
        panel = axes[0, 0]
        points(
            panel,
            trained.distribution.sample(3000),
            extent,
            f"{name}: one noisy point x, sigma = {float(sigma):.2f}",
            color="#bbbbbb",
        )
        at, arrows = x[0], {"sigma² score": (sigma**2 * own["score"])[0], "sigma eps": (sigma * own["eps"])[0]}
        for (label, arrow), color in zip(arrows.items(), ("#274c77", "#9c3848"), strict=True):
            panel.annotate(
                "",
                at + arrow,
                at,
                arrowprops={"arrowstyle": "->", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0},
            )
            panel.plot([], [], color=color, label=label)
        panel.plot(*at, "ko", ms=5, label="x")
        panel.plot(*own["x0"][0], "*", ms=11, color="#e09f3e", label="x0_hat")
        panel.legend(fontsize=7)
        text = [f"x = ({float(at[0]):.4f}, {float(at[1]):.4f})", f"sigma = {float(sigma):.4f}", ""]
        text += [f"{k:<16}({v[0]:+.4f}, {v[1]:+.4f})" for k, v in table.items()]
        text += ["", f"largest relative disagreement: {worst:.1e}"]
        axes[0, 1].axis("off")
        axes[0, 1].text(0, 0.98, "\n".join(text), family="monospace", fontsize=8, va="top")
        gallery.save(made, f"triangle_{name}")
        numbers[name] = {"sigma": float(sigma), "x": at.tolist(), "conversions": table, "largest_disagreement": worst}
    gallery.record("triangle", numbers)


if __name__ == "__main__":
    draw(*parse(options(__doc__), DEFAULT))
