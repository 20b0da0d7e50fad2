"""Digits by DDPM: eps-prediction over 1000 steps, ancestral sampling of 250 of them."""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source = "digits"
    c.process.name = "ddpm"
    c.model.prediction, c.model.label = "eps", "index"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 32, (1, 2), 1
    c.training.steps, c.training.batch_size = 2500, 64
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.995,)
    c.sampling.sampler.name, c.sampling.grid.name, c.sampling.grid.steps = "ancestral", "steps", 250
    return c
