"""Digits by a variational autoencoder with codes of 12 numbers, the bound in bits a dimension."""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.validation = "digits", 297
    c.model.net.name, c.model.net.width, c.model.net.depth, c.model.net.latent = "mlp_autoencoder", 256, 2, 12
    c.training.objective.name = "elbo"
    c.training.steps, c.training.batch_size = 2500, 64
    c.training.sample_every, c.training.validate_every = 500, 250
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 1e-3, "cosine", (0.999,)
    return c
