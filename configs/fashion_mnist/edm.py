"""Fashion-MNIST by class, by EDM's preconditioning, levels, weights and sampler; its DDPM++ at a width of 16.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.net.name, c.model.net.embedding, c.model.net.fir, c.model.net.inputs = "ncsnpp", "positional", (), "none"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 16, (1, 2, 4), 2
    c.model.net.attention, c.model.net.dropout = (2,), 0.0
    c.model.label, c.model.label_scale = "log_sigma", 0.25
    c.model.conditional, c.training.label_dropout = True, 0.1
    c.training.weighting.name = "edm"
    c.training.steps, c.training.batch_size = 4000, 64
    c.training.sample_every, c.training.validate_every = 1000, 1000
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.999,)
    c.sampling.sampler.name, c.sampling.grid.name, c.sampling.grid.n = "heun", "karras", 18
    return c
