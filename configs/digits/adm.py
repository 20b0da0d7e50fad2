"""Digits by class, by ADM's network on DDPM's steps; without its learned variance."""

from ml_collections import ConfigDict

from scorelab.experiments import adm


def get_config() -> ConfigDict:
    c = adm()
    c.data.source = "digits"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 32, (1, 2), 1, (1,)
    c.model.net.dropout = 0.0
    c.model.net.head, c.model.net.variance, c.model.conditional = 16, False, True
    c.training.objective.name, c.training.weighting.name, c.training.sigmas.name = "denoising", "sigma2", "process"
    c.sampling.sampler.variance = "posterior"
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.checkpoint_every = c.training.sample_every = 1000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
