"""Images, a VAE's latents of them, and the store that keeps latents on disk."""

from gspn_dit.exports import on_demand

_EXPORTS = {
    "ImageDataset": "gspn_dit.data.images",
    "LatentStore": "gspn_dit.data.latents",
    "decode": "gspn_dit.data.vae",
    "downsampling": "gspn_dit.data.vae",
    "encode_moments": "gspn_dit.data.vae",
    "how_to_encode": "gspn_dit.data.latents",
    "is_latent_store": "gspn_dit.data.latents",
    "load_vae": "gspn_dit.data.vae",
    "open_images": "gspn_dit.data.sources",
    "sample_posterior": "gspn_dit.data.vae",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
