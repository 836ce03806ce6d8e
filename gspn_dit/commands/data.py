"""Options of the command that encodes images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gspn_dit.arguments import MixedPrecision, default_workers
from gspn_dit.options import require


@dataclass
class EncodeOptions:
    """Data: images to encode, or a store to verify.

    Args:
        data: A named source (`digits`, `photos`), or a folder of `class/*.jpg`.
        vae: A packaged VAE (`digits`, `photos`), or a hub name or a local folder of a diffusers AutoencoderKL.
        image_size: Side of the square images in pixels.
        out: The store's folder; a run that was interrupted continues there.
        split: Split of a named source; a folder is one split.
        horizontal_flip: Encode every image's mirror image too, for training with horizontal flips.
        exif_orientation: Turn images as their EXIF orientation says; ADM, and so every published figure, does not.
        batch_size: Images the VAE encodes at once.
        shard_size: Images per shard file.
        num_workers: Processes that read images; 0 reads in this one. If not given, one for each core, up to 4.
        mixed_precision: Number format of the VAE: `no` is float32; or `auto`, `bf16`, `fp16`. Rounding to the store's
            float16 changes latents of the packaged VAEs by 3e-4 (root mean square), a VAE in bf16 by 1e-2 to 2e-2, in
            fp16 by 2e-3.
        device: `auto` is the accelerator if there is one.
        tokenizer: Store the tokens of the images' captions too, for `train-t2i`, by this one: a packaged tokenizer
            (`scenes`: CLIP's vocabulary) or a folder; `data` is then captioned images.
        text_encoder: Store the hidden states of the captions too, for a training with `text.encoder`: a folder of a
            text encoder of transformers; without `tokenizer` its own is taken.
        tokens: With either of these: tokens of a caption, as many as the text encoder takes; longer captions are cut.
        verify: Instead of encoding, compare this finished store's shards with their checksums.
    """

    data: str | None = None
    vae: str | None = None
    image_size: int | None = None
    out: str | None = None
    split: Literal["train", "test"] = "train"
    horizontal_flip: bool = False
    exif_orientation: bool = False
    batch_size: int = 32
    shard_size: int = 4096
    num_workers: int = field(default_factory=default_workers)
    mixed_precision: MixedPrecision = "no"
    device: str = "auto"
    tokenizer: str | None = None
    text_encoder: str | None = None
    tokens: int = 77
    verify: str | None = None

    def __post_init__(self) -> None:
        if self.verify is None:
            for key in ("data", "vae", "image_size", "out"):
                require(getattr(self, key) is not None, key, None, "a value, which encoding needs")
        for key in ("batch_size", "shard_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        require(self.tokens >= 3, "tokens", self.tokens, "3 or more: a begin, a word and an end")
        stores_captions = self.tokenizer is not None or self.text_encoder is not None
        require(stores_captions or self.tokens == 77, "tokens", self.tokens, "a tokenizer or a text_encoder beside it")
