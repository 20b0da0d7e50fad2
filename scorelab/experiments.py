"""Published experiments as configs: their process, loss, optimiser and sampler; what data and network, a config says.

x is data in [-1, 1] with noise. A release whose data lies in [0, 1] has noise levels half as large, so those of NCSN,
NCSNv2 and score_sde's VE are doubled here. A loss here is a mean over dimensions; where a release sums, its gradients
are as many times as large as ``summed`` says, so its bound on them and Adam's eps are divided by that: the weights move
as there. ``dims`` is the number of values of a sample.
"""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from scorelab.nn.dit import SIZES
from scorelab.samplers import PUBLISHED_STEP_SIZES
from scorelab.training import default_config

__all__ = [
    "adm",
    "classifier",
    "ddpm",
    "diffae",
    "dit",
    "edm",
    "edm2",
    "improved_ddpm",
    "ncsn",
    "ncsnv2",
    "score_sde_ve",
    "score_sde_vp",
    "vdm",
]


def _adam(c: ConfigDict, lr: float, clip: float | None, warmup: int, ema: float, summed: float = 1.0) -> None:
    c.optim.lr, c.optim.eps, c.optim.warmup = lr, 1e-8 / summed, warmup
    c.optim.clip, c.optim.ema = clip and clip / summed, (ema,)


def _every(c: ConfigDict, steps: int, batch_size: int, often: int) -> None:
    c.training.steps, c.training.batch_size = steps, batch_size
    c.training.checkpoint_every = c.training.sample_every = min(often, steps)


def _langevin(c: ConfigDict, levels: int, sigma_max: float, steps: int, step_size: float, denoise: bool) -> None:
    """Levels of a release with data in [0, 1], down to 0.01, and annealed Langevin dynamics over them."""
    c.process.name, c.process.sigma_min, c.process.sigma_max = "ve", 2 * 0.01, 2 * sigma_max
    c.training.sigmas.name, c.training.sigmas.levels, c.training.weighting.name = "sequence", levels, "sigma2"
    c.sampling.grid.name, c.sampling.grid.n = "geometric", levels
    # its square is that of a noise level
    c.sampling.sampler.name, c.sampling.sampler.steps = "annealed_langevin", steps
    c.sampling.sampler.step_size, c.sampling.sampler.denoise = 4 * step_size, denoise


def ncsn(
    dims: int, *, sigma_max: float = 1.0, levels: int = 10, steps: int = 100, snr: float = 0.0, ema: float = 0.0
) -> ConfigDict:
    """NCSN: Song and Ermon, Generative Modeling by Estimating Gradients of the Data Distribution, 2019,
    arXiv:1907.05600, with its RefineNet. snr: score_sde's size of a Langevin step, 2 (snr sigma)^2 score.
    """
    c = default_config()
    c.model.net.name, c.model.net.levels = "refinenet", levels
    c.model.prediction, c.model.label, c.model.index_order = "score", "index", "descending"
    _langevin(c, levels, sigma_max, steps, 4 * (snr * 0.01) ** 2 if snr else PUBLISHED_STEP_SIZES["ncsn"], snr > 0)
    c.data.dequantise = snr == 0
    _adam(c, 1e-3, None, 0, ema, dims / 2)
    _every(c, 200_000, 128, 5000)
    return c


def ncsnv2(
    dims: int, *, sigma_max: float, levels: int, steps: int, step_size: float, ema: float = 0.999, depth: int = 4
) -> ConfigDict:
    """NCSNv2: Song and Ermon, Improved Techniques for Training Score-Based Generative Models, 2020, arXiv:2006.09011,
    with its RefineNet, which is not told the noise level.
    """
    c = default_config()
    c.model.net.name, c.model.net.depth, c.model.prediction = "refinenet", depth, "eps"
    _langevin(c, levels, sigma_max, steps, step_size, True)
    _adam(c, 1e-4, None, 0, ema, dims / 2)
    _every(c, 300_000, 128, 5000)
    return c


def score_sde_ve(
    dims: int,
    *,
    sigma_max: float = 50.0,
    levels: int = 1000,
    snr: float = 0.16,
    continuous: bool = True,
    mean: bool = False,
    ema: float = 0.999,
) -> ConfigDict:
    """score_sde's VE: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv:2011.13456. mean: the
    release's loss is a mean over dimensions, else half a sum.
    """
    c = default_config()
    c.process.name, c.process.sigma_min, c.process.sigma_max = "ve", 2 * 0.01, 2 * sigma_max
    c.model.prediction, c.training.weighting.name = "eps", "sigma2"
    c.training.sigmas.name = "process"
    if not continuous:
        c.training.sigmas.name, c.training.sigmas.levels = "sequence", levels
        c.model.label, c.model.index_order = "index", "descending"
    _adam(c, 2e-4, 1.0, 5000, ema, 1.0 if mean else dims / 2)
    _every(c, 1_300_001, 128, 10_000)
    c.sampling.grid.name, c.sampling.grid.n = "log_linear", levels
    c.sampling.sampler.name, c.sampling.sampler.corrector_first = "predictor_corrector", True
    c.sampling.sampler.predictor = {"name": "reverse_diffusion"}
    c.sampling.sampler.corrector = {"name": "langevin", "snr": snr}
    return c


def score_sde_vp(process: str = "vp", *, continuous: bool = True, sampler: str = "", lr: float = 2e-4) -> ConfigDict:
    """score_sde's "vp" and "subvp", the same source; sampler: "ancestral" of the discrete, Euler-Maruyama of the
    continuous ones, or "reverse_diffusion".
    """
    c = default_config()
    c.process.name, c.model.prediction = process if continuous else "ddpm", "eps"
    c.training.sigmas.name, c.training.weighting.name = "process", "sigma2"

    c.model.label, c.model.label_scale = ("time", 999.0) if continuous else ("index", 1.0)
    _adam(c, lr, 1.0, 5000, 0.9999)
    _every(c, 1_300_001, 128, 10_000)
    c.sampling.grid.name = "process" if continuous else "steps"
    if continuous:
        c.sampling.grid.n = 1000
    c.sampling.sampler.name = sampler or ("reverse_sde" if continuous else "ancestral")
    if c.sampling.sampler.name == "reverse_sde":
        c.sampling.sampler.explicit = True
    elif c.sampling.sampler.name == "ancestral":
        c.sampling.sampler.variance = "forward"
    return c


def ddpm(*, lr: float = 2e-4, variance: str = "forward") -> ConfigDict:
    """DDPM: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239."""
    c = default_config()
    c.process.name, c.model.prediction, c.model.label = "ddpm", "eps", "index"
    c.model.net.name = "ddpm"
    c.training.sigmas.name, c.training.weighting.name = "process", "sigma2"
    _adam(c, lr, 1.0, 5000, 0.9999)
    _every(c, 800_000, 128, 10_000)
    c.sampling.grid.name = "steps"
    c.sampling.sampler.name, c.sampling.sampler.variance = "ancestral", variance
    c.sampling.clip = True
    return c


def adm(*, schedule: str = "ddpm", steps: int = 1000, lr: float = 1e-4, sampled: int = 250) -> ConfigDict:
    """ADM, with a learned variance: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021,
    arXiv:2105.05233. schedule: "ddpm" (linear betas) or "ddpm_cosine"; sampled: so many of its steps.
    """
    c = default_config()
    c.process.name, c.process.steps, c.model.prediction, c.model.label = schedule, steps, "eps", "index"
    c.model.net.name, c.model.net.variance, c.training.objective.name = "adm", True, "hybrid"
    _adam(c, lr, None, 0, 0.9999)
    c.optim.name = "adamw"
    _every(c, 500_000, 256, 10_000)
    c.sampling.grid.name, c.sampling.grid.steps = "steps", sampled
    c.sampling.sampler.name, c.sampling.sampler.variance = "ancestral", "learned"
    c.sampling.clip = True
    return c


def diffae(*, lr: float = 1e-4) -> ConfigDict:
    """Diffusion autoencoder: Preechakul et al., 2022, arXiv:2111.15640; DDIM by 100 of DDPM's steps."""
    c = default_config()
    c.process.name, c.model.prediction, c.model.label, c.model.net.name = "ddpm", "eps", "index", "diffae"
    c.training.weighting.name, c.training.sigmas.name = "sigma2", "process"
    _adam(c, lr, 1.0, 0, 0.9999)
    _every(c, 1_000_000, 128, 10_000)
    c.sampling.grid.name, c.sampling.grid.steps, c.sampling.sampler.name = "steps", 100, "ddim"
    c.sampling.clip = True
    return c


def improved_ddpm(*, schedule: str = "ddpm_cosine", steps: int = 4000, lr: float = 1e-4) -> ConfigDict:
    """Improved DDPM: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, arXiv:2102.09672;
    its network is told steps as if there were 1,000.
    """
    c = adm(schedule=schedule, steps=steps, lr=lr, sampled=steps)
    # ADM's before its changes
    c.model.net = ConfigDict({"name": "unet", "width": 128, "multipliers": (1, 2, 3, 4), "blocks": 3, "heads": 4})
    c.model.net.update(attention=(2, 3), middle_attention=True, time="adaptive", group=1, variance=True)
    c.model.label_scale = 1000 / steps
    _every(c, 500_000, 128, 10_000)
    return c


def vdm(*, gamma_min: float = -13.3, gamma_max: float = 5.0) -> ConfigDict:
    """VDM: Kingma, Salimans, Poole and Ho, Variational Diffusion Models, 2021, arXiv:2107.00630, with ``unet``; it
    predicts v, whose error the bound weighs as it does that of eps. gamma: log sigma^2 at the ends, which are learned.
    """
    c = default_config()
    c.process.name, c.process.gamma_min, c.process.gamma_max = "learned", gamma_min, gamma_max
    c.model.net.name, c.model.net.input_features, c.model.prediction = "unet", (6, 7), "v"
    c.training.objective.name = "continuous_bound"
    _adam(c, 2e-4, None, 0, 0.9999)
    c.optim.name, c.optim.weight_decay = "adamw", 0.01
    c.sampling.grid.name, c.sampling.grid.n, c.sampling.sampler.name = "process", 250, "ancestral"
    return c


def classifier(*, schedule: str = "ddpm", steps: int = 1000, lr: float = 3e-4) -> ConfigDict:
    """ADM's classifier of noisy images, by the steps that its score models have, to guide them; the same source."""
    c = default_config()
    c.process.name, c.process.steps, c.model.label = schedule, steps, "index"
    c.model.net.name, c.model.input_scale, c.model.conditional = "classifier", "process", True
    c.training.objective.name, c.training.sigmas.name = "cross_entropy", "process"
    _adam(c, lr, None, 0, 0.9999)
    c.optim.name, c.optim.weight_decay = "adamw", 0.05
    _every(c, 150_000, 256, 10_000)
    return c


def features() -> ConfigDict:
    """The same network of images with hardly any noise, for what its last layer sees: no paper's."""
    c = classifier()
    c.process = ConfigDict({"name": "ve", "sigma_min": 0.01, "sigma_max": 0.1})
    c.model.label = "time"
    return c


def _half_life(images: float, batch_size: int) -> float:
    """The decay of an average that halves a weight's share in so many images."""
    return float(0.5 ** (batch_size / images))


def edm(dims: int, *, preconditioning: str = "edm", batch_size: int = 512, lr: float = 1e-3, n: int = 18) -> ConfigDict:
    """EDM, with its preconditioning or the "vp" and "ve" that it compares with: Karras et al., Elucidating the Design
    Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364; without its augmentation. n: levels to sample.
    """
    c = default_config()
    c.training.sigmas.name, c.training.weighting.name, c.model.prediction = "process", "sigma2", "eps"
    if preconditioning == "edm":
        c.process.name, c.process.sigma_min, c.process.sigma_max = "ve", 0.002, 80.0
        c.model.prediction, c.model.sigma_data, c.training.weighting.name = "edm", 0.5, "edm"
        c.model.label, c.model.label_scale = "log_sigma", 0.25
        c.training.sigmas.name, c.training.sigmas.mean, c.training.sigmas.std = "log_normal", -1.2, 1.2
    elif preconditioning == "vp":
        c.process.name, c.model.label, c.model.label_scale = "vp", "time", 999.0
    elif preconditioning == "ve":
        c.process.name, c.process.sigma_min, c.process.sigma_max = "ve", 0.02, 100.0
    else:
        raise ValueError(f"preconditioning is {preconditioning!r}; expected edm, vp or ve")
    # a warm-up of 10 million images, 200 million in all
    _adam(c, lr, None, math.ceil(1e7 / batch_size), _half_life(5e5, batch_size), dims)
    _every(c, math.ceil(2e8 / batch_size), batch_size, 5000)
    c.sampling.sampler.name = "heun"
    c.sampling.grid.name, c.sampling.grid.n, c.sampling.grid.rho = "karras", n, 7.0
    return c


def edm2(
    dims: int, *, width: int, lr: float, decay_from: int, images: int, mean: float, std: float, dropout: float = 0.0
) -> ConfigDict:
    """EDM2: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024, arXiv:2312.02696.
    images: how many it is trained on, in units of 2^20; mean, std: of log sigma.
    """
    c = default_config()
    c.process.name, c.process.sigma_min, c.process.sigma_max = "ve", 0.002, 80.0
    c.model.net.name, c.model.net.width, c.model.net.dropout = "edm2", width, dropout
    c.model.prediction, c.model.sigma_data, c.model.conditional = "edm", 0.5, True
    c.training.sigmas.name, c.training.sigmas.mean, c.training.sigmas.std = "log_normal", mean, std
    c.training.weighting.name = "edm"
    _adam(c, lr, None, math.ceil(1e7 / 2048), 0.999, dims)
    c.optim.beta2, c.optim.ema_power = 0.99, (0.05, 0.1)
    c.optim.schedule.name, c.optim.schedule.decay_from = "inverse_sqrt", decay_from
    _every(c, images * 2**20 // 2048, 2048, 4096)
    c.training.keep_every = 4096
    c.sampling.sampler.name = "heun"
    c.sampling.grid.name, c.sampling.grid.n, c.sampling.grid.rho = "karras", 32, 7.0
    return c


def dit(size: str, *, patch: int = 2, scale: float = 1.5) -> ConfigDict:
    """DiT of the latents of Stable Diffusion's autoencoder, with a learned variance: Peebles and Xie, Scalable
    Diffusion Models with Transformers, 2023, arXiv:2212.09748. size: "S", "B", "L" or "XL"; scale: of guidance.
    """
    c = default_config()
    c.process.name, c.model.prediction, c.model.label = "ddpm", "eps", "index"
    c.model.net = ConfigDict({"name": "dit", "patch": patch, "variance": True, **SIZES[size]})
    c.model.conditional, c.training.label_dropout, c.training.objective.name = True, 0.1, "hybrid"
    _adam(c, 1e-4, None, 0, 0.9999)
    c.optim.name = "adamw"
    _every(c, 7_000_000 if size == "XL" else 400_000, 256, 50_000)
    c.sampling.grid.name, c.sampling.grid.steps, c.sampling.guidance = "steps", 250, scale
    c.sampling.sampler.name, c.sampling.sampler.variance = "ancestral", "learned"
    return c
