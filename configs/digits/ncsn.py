"""Digits by annealed Langevin dynamics on a geometric sequence of noise levels (NCSN)."""

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
    c.training.sigmas.name, c.training.sigmas.levels = "sequence", 20
    c.training.weighting.name = "sigma2"
    c.training.steps, c.training.batch_size = 2500, 64
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.995,)
    c.sampling.sampler.name, c.sampling.grid.name, c.sampling.grid.n = "annealed_langevin", "geometric", 20
    c.sampling.sampler.steps, c.sampling.sampler.step_size = 10, 7e-4
    return c
