"""A diffusion autoencoder of Fashion-MNIST: an encoder of 64 numbers, and an eps-model on DDPM's steps, told them.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.experiments import diffae


def get_config() -> ConfigDict:
    c = diffae()
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.net.code, c.model.net.width, c.model.net.encoder_multipliers = 64, 16, (1, 2, 4)
    c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = (1, 2, 4), 1, (2,)
    c.training.steps, c.training.batch_size = 8000, 32
    c.training.checkpoint_every = c.training.sample_every = 2000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.998,)
    return c
