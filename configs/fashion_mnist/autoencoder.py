"""Codes of Fashion-MNIST, 4x7x7 numbers each, for configs/fashion_mnist/latent.py, by a bound whose codes
cost a tenth.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source = "fashion_mnist"
    c.model.net.name, c.model.net.width, c.model.net.multipliers, c.model.net.latent = "autoencoder", 16, (1, 2, 4), 4
    # with 1 half of the channels say nothing after these few steps, and images are blurred
    c.training.objective.name, c.training.objective.kl_weight = "elbo", 0.1
    c.training.steps, c.training.batch_size = 5000, 32
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.998,)
    return c
