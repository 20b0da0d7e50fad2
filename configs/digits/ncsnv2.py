"""Digits by NCSNv2: a RefineNet that is not told the noise level, and annealed Langevin dynamics."""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(64, sigma_max=6.0, levels=22, steps=20, step_size=1e-5)
    c.data.source = "digits"
    c.model.net.width = 32
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.checkpoint_every = c.training.sample_every = 1000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 1e-3, 100, "cosine", (0.995,)
    return c
