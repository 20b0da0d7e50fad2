"""Codes that scores may live in: of autoencoders, and of diffusion autoencoders."""

from scorelab.latent.autoencoders import Autoencoded, AutoencoderModel, autoencoded
from scorelab.latent.diffae import Directions, Semantic, codes, ddim_levels, decoded, latents, semantic
from scorelab.latent.frozen import Frozen

__all__ = [
    "Autoencoded",
    "AutoencoderModel",
    "Directions",
    "Frozen",
    "Semantic",
    "autoencoded",
    "codes",
    "ddim_levels",
    "decoded",
    "latents",
    "semantic",
]
