"""How each process turns time into noise: alpha, std, sigma and log-SNR against t."""

from __future__ import annotations

import torch

from scorelab import VE, VP, Cosine, DiscreteVP, Flow, Process, SubVP
from scorelab.plotting import figure
from scorelab.processes import cosine_betas, linear_betas
from toy.common import Gallery, options, parse

PROCESSES: dict[str, Process] = {
    "VE (0.01 to 50)": VE(),
    "VP (linear beta)": VP(),
    "sub-VP": SubVP(),
    "cosine": Cosine(),
    "flow": Flow(),
    "DDPM, 1000 steps": DiscreteVP(linear_betas()),
    "improved DDPM, 1000 steps": DiscreteVP(cosine_betas()),
}


def draw(gallery: Gallery) -> None:
    """schedules.png, and the ends of every process in metrics.json."""
    made, axes = figure(4, size=3.4)
    panels = (
        ("alpha(t), scale of the data", lambda p, t: p.alpha(t), False),
        ("std(t), scale of the noise", lambda p, t: p.std(t), True),
        ("sigma(t) = std / alpha", lambda p, t: p.sigma(t), True),
        ("log SNR = -2 log sigma", lambda p, t: -2 * p.sigma(t).log(), False),
    )
    numbers = {}
    for name, process in PROCESSES.items():
        t = torch.linspace(process.t_min, process.t_max, 600, dtype=torch.float64)
        numbers[name] = {"sigma_at_t_min": process.sigma_range[0], "sigma_at_t_max": process.sigma_range[1]}
        # the discrete processes lie on their continuous forms: dashes let both be seen
        style = "--" if isinstance(process, DiscreteVP) else "-"
        for (title, values, logarithmic), panel in zip(panels, axes[0], strict=True):
            panel.plot(t.numpy(), values(process, t).numpy(), style, label=name, lw=1.6)
            panel.set(title=title, xlabel="t", yscale="log" if logarithmic else "linear")
            panel.title.set_fontsize(9)
    made.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    gallery.save(made, "schedules")
    gallery.record("schedules", numbers)


if __name__ == "__main__":
    draw(parse(options(__doc__), ())[0])
