"""Fashion-MNIST by class, by EDM2: magnitudes are kept, and the loss weighs by its own uncertainty.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.experiments import edm2


def get_config() -> ConfigDict:
    c = edm2(28 * 28, width=16, lr=0.01, decay_from=500, images=1, mean=-0.4, std=1.2)
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.net.multipliers, c.model.net.blocks, c.model.net.attention, c.model.net.head = (1, 2, 4), 1, (2,), 16
    c.training.steps, c.training.batch_size = 2400, 64
    c.training.checkpoint_every = c.training.keep_every = c.training.sample_every = 600
    c.optim.lr, c.optim.warmup, c.optim.ema = 0.01, 100, (0.995,)
    return c
