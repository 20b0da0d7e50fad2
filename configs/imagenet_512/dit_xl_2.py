"""ImageNet at 512 px by class, in latents, by DiT-XL/2: Peebles and Xie, 2023, arXiv:2212.09748.

data.path is a .npz of samples (N, 4, 64, 64), Stable Diffusion's latents times 0.18215, and labels (N,).
"""

from ml_collections import ConfigDict

from scorelab.experiments import dit


def get_config() -> ConfigDict:
    c = dit("XL")
    c.data.source, c.model.codec.name, c.training.steps = "arrays", "identity", 3_000_000
    return c
