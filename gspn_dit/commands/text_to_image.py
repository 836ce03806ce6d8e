"""Options of the commands for text-to-image; those of the trainings themselves are in configurations of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gspn_dit.arguments import MixedPrecision, check_num_inference_steps
from gspn_dit.options import require


@dataclass
class EncodeTextToImageOptions:
    """Data: captioned pictures to encode, or prompts whose latents the pipeline draws.

    Args:
        base: The folder or hub name of a pipeline of Stable Diffusion 1.x, 2.x or SD-XL: its VAE encodes, its text
            encoders read, and where there are no pictures it draws.
        out: The store's folder; a run that was interrupted continues there.
        data: Captioned pictures: a named source (`scenes`), or a folder of pictures with `.txt` beside them or a jsonl
            of `file_name` and `text`.
        prompts: In place of pictures: a text file with a prompt a line, or what `data` takes, of which the captions are
            read; the pipeline draws a picture for each.
        split: Split of a named source; a folder is one split.
        image_size: Side of the square pictures in pixels; the pipeline's own if not given.
        num_inference_steps: For `prompts`: denoising steps, by the pipeline's own scheduler.
        guidance_scale: For `prompts`: classifier-free guidance; 1 is none.
        seed: For `prompts`: picture i depends on (seed, i) alone.
        batch_size: Pictures at once.
        shard_size: Pictures per shard file; a run that was interrupted makes anew what it had not finished of one.
        num_workers: Processes that read pictures; 0 reads in this one.
        mixed_precision: Number format of the pipeline: `no` is float32; or `auto`, `bf16`, `fp16`.
        device: `auto` is the accelerator if there is one.
    """

    base: str
    out: str
    data: str | None = None
    prompts: str | None = None
    split: Literal["train", "test"] = "train"
    image_size: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0
    batch_size: int = 8
    shard_size: int = 512
    num_workers: int = 4
    mixed_precision: MixedPrecision = "no"
    device: str = "auto"

    def __post_init__(self) -> None:
        one = (self.data is None) != (self.prompts is None)
        require(one, "prompts", self.prompts, "either data, pictures to encode, or prompts to draw")
        require(self.image_size is None or self.image_size >= 1, "image_size", self.image_size, "pixels, 1 or more")
        check_num_inference_steps(self.num_inference_steps)
        require(self.guidance_scale >= 1, "guidance_scale", self.guidance_scale, "1 (no guidance) or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for key in ("batch_size", "shard_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")

    @property
    def vae(self) -> str:
        """Where the VAE is from."""
        return self.base

    @property
    def horizontal_flip(self) -> bool:
        """A mirrored picture is not what its caption says."""
        return False

    @property
    def exif_orientation(self) -> bool:
        """As :class:`EncodeOptions` has it by default."""
        return False

    @property
    def tokenizer(self) -> None:
        """Captions are read by the pipeline, as is what follows."""
        return None

    @property
    def text_encoder(self) -> None:
        """See `tokenizer`."""
        return None
