"""Digits by VDM: a learned schedule, the bound in continuous time, and Fourier features of the input."""

from ml_collections import ConfigDict

from scorelab.experiments import vdm


def get_config() -> ConfigDict:
    c = vdm(gamma_min=-7.8)
    c.data.source, c.data.validation = "digits", 300
    c.model.net.input_features = (2, 3)
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 32, (1, 2), 1, (1,)
    c.training.steps, c.training.batch_size = 3000, 64
    c.training.checkpoint_every = c.training.sample_every = 1000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
