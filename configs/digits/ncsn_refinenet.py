"""Digits by NCSN: a RefineNet that is told the noise level, and annealed Langevin dynamics."""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(64, sigma_max=3.0)
    c.data.source = "digits"
    c.model.net.width = 32
    c.data.dequantise = False
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.checkpoint_every = c.training.sample_every = 1000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 1e-3, 100, "cosine", (0.995,)
    return c
