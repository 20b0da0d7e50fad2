"""Latent diffusion of Fashion-MNIST by class: a score of the codes of configs/fashion_mnist/autoencoder.py, whose run
--config.model.codec.path names. See docs/latents.md.

The images come from Debian's package dataset-fashion-mnist, or from data.path, a folder with the four files.
"""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source = "fashion_mnist"
    c.model.codec.name, c.model.codec.path = "autoencoder", "runs/autoencoder"
    c.model.net.name, c.model.net.width, c.model.net.multipliers, c.model.net.blocks = "unet", 32, (1, 2), 2
    c.model.label, c.model.label_scale = "log_sigma", 0.25
    c.model.conditional, c.training.label_dropout = True, 0.1
    c.training.weighting.name = "edm"
    c.training.steps, c.training.batch_size = 16_000, 64
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.999,)
    c.sampling.sampler.name, c.sampling.grid.name, c.sampling.grid.n = "dpm2m", "karras", 15
    c.sampling.guidance, c.sampling.guidance_interval = 1.5, (0.2, 5.0)
    return c
