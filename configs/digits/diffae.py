"""A diffusion autoencoder of digits: an encoder of 32 numbers, and an eps-model on DDPM's steps that is told them."""

from ml_collections import ConfigDict

from scorelab.experiments import diffae


def get_config() -> ConfigDict:
    c = diffae()
    c.data.source, c.data.validation = "digits", 297
    c.model.net.code, c.model.net.width, c.model.net.encoder_multipliers = 32, 32, (1, 2)
    c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = (1, 2), 1, (1,)
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.checkpoint_every = c.training.sample_every = c.training.validate_every = 1000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
