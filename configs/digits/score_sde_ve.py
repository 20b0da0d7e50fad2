"""Digits by score_sde's NCSN++ and VE, with predictor-corrector sampling."""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_ve


def get_config() -> ConfigDict:
    c = score_sde_ve(64, levels=200)
    c.data.source = "digits"
    c.process.sigma_min, c.process.sigma_max = 0.05, 12.0
    c.model.net.name = "ncsnpp"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = 32, (1, 2), 1, (1,)
    c.model.net.dropout = 0.0
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.checkpoint_every = c.training.sample_every = 1000
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 100, "cosine", (0.995,)
    return c
