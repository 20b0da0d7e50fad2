"""Networks: a residual MLP for points and DDPM's U-Net for signals, images and volumes."""

from scorelab.nn.mlp import MLP
from scorelab.nn.unet import UNet

__all__ = ["MLP", "NETWORKS", "UNet"]

NETWORKS = {"MLP": MLP, "UNet": UNet}
"""Networks that ``ScoreModel.load`` rebuilds by name."""
