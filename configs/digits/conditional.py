"""Digits by class, with a tenth of the labels left out for classifier-free guidance; sampled by Heun's method."""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source = "digits"
    c.process.name = "ve"
    # data in [-1, 1]^64: the largest distance of two digits is 9.6
    c.process.sigma_min, c.process.sigma_max = 0.05, 12.0
    c.model.prediction, c.model.input_scale = "edm", "unit_variance"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 32, (1, 2), 1
    c.model.conditional, c.training.label_dropout = True, 0.1
    c.training.sigmas.name, c.training.weighting.name = "log_uniform", "sigma2"
    c.training.steps, c.training.batch_size = 4000, 64
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.995,)
    c.sampling.sampler.name, c.sampling.grid.name, c.sampling.grid.n = "heun", "karras", 18
    c.sampling.samples = 100
    return c
