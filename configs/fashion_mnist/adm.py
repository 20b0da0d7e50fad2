"""Fashion-MNIST by class, by ADM's network on DDPM's steps; without its learned variance.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.experiments import adm


def get_config() -> ConfigDict:
    c = adm()
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 16, (1, 2, 4), 1, (2,)
    c.model.net.dropout = 0.0
    c.model.net.head, c.model.net.variance, c.model.conditional = 16, False, True
    c.training.objective.name, c.training.weighting.name, c.training.sigmas.name = "denoising", "sigma2", "process"
    c.sampling.sampler.variance = "posterior"
    c.training.steps, c.training.batch_size = 2400, 64
    c.training.checkpoint_every = c.training.sample_every = 600
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
