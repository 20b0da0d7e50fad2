"""Fashion-MNIST by class, for classifier-free guidance: as ddpm.py, with a tenth of the labels left out.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.process.name = "ddpm"
    c.model.prediction, c.model.label = "eps", "index"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 16, (1, 2, 4), 1, (2,)
    c.model.conditional, c.training.label_dropout = True, 0.1
    c.training.steps, c.training.batch_size = 2400, 64
    c.training.sample_every, c.training.validate_every = 600, 200
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.995,)
    c.sampling.sampler.name, c.sampling.grid.name, c.sampling.grid.steps = "ancestral", "steps", 100
    return c
