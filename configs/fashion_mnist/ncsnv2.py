"""Fashion-MNIST by NCSNv2: a RefineNet that is not told the noise level, and annealed Langevin dynamics.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(28 * 28, sigma_max=25.0, levels=100, steps=10, step_size=1e-5)
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.net.width = 16
    c.training.steps, c.training.batch_size = 2400, 64
    c.training.checkpoint_every = c.training.sample_every = 600
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 1e-3, 100, "cosine", (0.995,)
    return c
