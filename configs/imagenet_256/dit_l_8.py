"""ImageNet at 256 px by class, in latents, by DiT-L/8: Peebles and Xie, 2023, arXiv:2212.09748.

data.path is a .npz of samples (N, 4, 32, 32), Stable Diffusion's latents times 0.18215, and labels (N,).
"""

from ml_collections import ConfigDict

from scorelab.experiments import dit


def get_config() -> ConfigDict:
    c = dit("L", patch=8)
    c.data.source, c.model.codec.name = "arrays", "identity"
    return c
