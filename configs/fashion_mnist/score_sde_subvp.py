"""Fashion-MNIST by score_sde's DDPM++ and sub-VP, with Euler-Maruyama steps of the reverse SDE.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_vp


def get_config() -> ConfigDict:
    c = score_sde_vp("subvp")
    c.data.source, c.data.validation = "fashion_mnist", 500
    c.model.net.name = "ncsnpp"
    c.model.net.update(embedding="positional", fir=(), inputs="none")
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 16, (1, 2, 4), 1, (2,)
    c.model.net.dropout = 0.0
    c.sampling.grid.n = 500
    c.training.steps, c.training.batch_size = 2400, 64
    c.training.checkpoint_every = c.training.sample_every = 600
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
