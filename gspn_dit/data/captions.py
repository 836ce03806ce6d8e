"""Pictures with captions."""

from __future__ import annotations

from gspn_dit.data.images import ImageDataset


class CaptionedImages(ImageDataset):
    """Images with a caption each; `caption(i)` depends on nothing but the dataset's arguments and i."""

    def caption(self, index: int) -> str:
        """What image `index` shows."""
        raise NotImplementedError
