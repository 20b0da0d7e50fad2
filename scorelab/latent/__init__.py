"""Codes that scores may live in: of autoencoders, and of diffusion autoencoders."""

from scorelab.latent.autoencoders import Autoencoded, AutoencoderModel, autoencoded

__all__ = ["Autoencoded", "AutoencoderModel", "autoencoded"]
