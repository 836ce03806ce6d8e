"""Where training data comes from: image sources by name, and the store that keeps latents on disk."""

from gspn_dit.exports import on_demand

_EXPORTS = {
    "CaptionedImages": "gspn_dit.data.captions",
    "ImageDataset": "gspn_dit.data.images",
    "LatentStore": "gspn_dit.data.latent_store",
    "Source": "gspn_dit.data.source",
    "how_to_encode": "gspn_dit.data.latent_store",
    "is_latent_store": "gspn_dit.data.latent_store",
    "open_captioned": "gspn_dit.data.captions",
    "open_images": "gspn_dit.data.sources",
    "register_source": "gspn_dit.data.sources",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
