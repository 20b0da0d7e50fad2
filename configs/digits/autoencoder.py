"""Codes of digits, 2x4x4 numbers each, for configs/digits/latent.py; the bound in bits a dimension."""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.validation = "digits", 297
    c.model.net.name, c.model.net.width, c.model.net.multipliers, c.model.net.latent = "autoencoder", 32, (1, 2), 2
    c.training.objective.name = "elbo"
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.sample_every, c.training.validate_every = 1000, 500
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.999,)
    return c
