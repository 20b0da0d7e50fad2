"""Networks: a residual MLP for points and DDPM's U-Net for signals, images and volumes."""

from torch import nn

from scorelab.nn.mlp import MLP
from scorelab.nn.unet import UNet

__all__ = ["MLP", "NETWORKS", "UNet"]

NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet}
"""Networks by the names that configs and saved models have for them."""
