"""Images to latents and back: the VAE, what its latents are scaled by, and decoding in tiles."""

from gspn_dit.exports import on_demand

_EXPORTS = {
    "decode": "gspn_dit.autoencoder.vae",
    "downsampling": "gspn_dit.autoencoder.vae",
    "encode_moments": "gspn_dit.autoencoder.vae",
    "load_vae": "gspn_dit.autoencoder.vae",
    "sample_posterior": "gspn_dit.autoencoder.vae",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
