"""Fashion-MNIST by VDM: a learned schedule, the bound in continuous time, and Fourier features of the input.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.experiments import vdm


def get_config() -> ConfigDict:
    c = vdm(gamma_min=-13.3)
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.net.input_features = (6, 7)
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 16, (1, 2, 4), 1, (2,)
    c.training.steps, c.training.batch_size = 2400, 64
    c.training.checkpoint_every = c.training.sample_every = 600
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
