"""A score of the codes of configs/fashion_mnist/diffae.py, whose run --config.model.codec.path names: what is drawn
becomes images again.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.codec.name, c.model.codec.path = "semantic", "runs/diffae"
    c.model.net.name, c.model.net.width, c.model.net.depth = "mlp", 256, 4
    c.training.weighting.name = "edm"
    c.training.steps, c.training.batch_size = 8000, 256
    c.training.sample_every, c.training.validate_every = 4000, 2000
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 1e-3, "cosine", (0.999,)
    c.sampling.samples = 60
    return c
