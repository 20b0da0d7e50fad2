"""Digits by class, by DiT on DDPM's steps; without its learned variance."""

from ml_collections import ConfigDict

from scorelab.experiments import dit


def get_config() -> ConfigDict:
    c = dit("S", patch=2)
    c.data.source = "digits"
    c.model.net.width, c.model.net.depth, c.model.net.heads, c.model.net.variance = 96, 6, 4, False
    c.training.objective.name, c.training.weighting.name, c.training.sigmas.name = "denoising", "sigma2", "process"
    c.sampling.sampler.variance = "posterior"
    c.training.steps, c.training.batch_size = 6000, 64
    c.training.checkpoint_every = c.training.sample_every = 2000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
