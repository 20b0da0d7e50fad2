"""Latent diffusion of digits by class: a score of the codes of configs/digits/autoencoder.py, whose run
--config.model.codec.path names."""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.validation = "digits", 297
    c.model.codec.name, c.model.codec.path = "autoencoder", "runs/autoencoder"
    c.model.net.name, c.model.net.width, c.model.net.multipliers, c.model.net.blocks = "unet", 32, (1, 2), 1
    c.model.conditional, c.training.label_dropout = True, 0.1
    c.training.weighting.name = "edm"
    c.training.steps, c.training.batch_size = 4000, 64
    c.training.sample_every, c.training.validate_every = 1000, 1000
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.999,)
    return c
