"""Digits by score_sde's DDPM++ and VP, with Euler-Maruyama steps of the reverse SDE."""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_vp


def get_config() -> ConfigDict:
    c = score_sde_vp()
    c.data.source = "digits"
    c.model.net.name = "ncsnpp"
    c.model.net.update(embedding="positional", fir=(), inputs="none")
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 32, (1, 2), 1, (1,)
    c.model.net.dropout = 0.0
    c.sampling.grid.n = 1000
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.checkpoint_every = c.training.sample_every = 1000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
