"""ImageNet at 512 px by class, in latents, by EDM2-XXL: Karras et al., 2024, arXiv:2312.02696, table 6.

data.path is a .npz of samples (N, 4, 64, 64), latents of Stable Diffusion less (5.81, 3.25, 0.12, -2.15), over
twice (4.17, 4.62, 3.71, 3.28), and labels (N,).
"""

from ml_collections import ConfigDict

from scorelab.experiments import edm2


def get_config() -> ConfigDict:
    c = edm2(4 * 64 * 64, width=448, lr=0.0065, decay_from=70_000, images=896, mean=-0.4, std=1.0, dropout=0.1)
    c.data.source, c.model.codec.name = "arrays", "identity"
    return c
