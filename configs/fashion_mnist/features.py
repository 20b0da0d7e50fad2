"""A classifier of Fashion-MNIST with hardly any noise, whose last layer is what distances of sets are of:
scorelab evaluate --features fashion_mnist.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.experiments import features


def get_config() -> ConfigDict:
    c = features()
    c.data.source, c.data.validation = "fashion_mnist", 5000
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 16, (1, 2, 4), 1
    c.model.net.attention, c.model.net.head, c.model.net.dropout = (2,), 32, 0.1
    c.training.steps, c.training.batch_size = 3000, 64
    c.training.checkpoint_every = c.training.validate_every = 500
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 1e-3, "cosine", (0.995,)
    return c
