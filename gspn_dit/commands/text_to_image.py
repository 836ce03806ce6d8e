"""Options of the commands that make images of texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from gspn_dit.arguments import MixedPrecision, check_guidance, check_num_inference_steps
from gspn_dit.commands.sampling import ImagesOut
from gspn_dit.errors import InputError
from gspn_dit.options import require
from gspn_dit.storage.packaged import PACKAGED_TEXT_TO_IMAGE, absolute


@dataclass
class GenerateOptions(ImagesOut):
    """Text to images of any size, by a Stable Diffusion pipeline, with or without replacement layers.

    Args:
        prompt: Texts, each in quotes.
        prompts: A text file of further prompts, one a line; blank lines and lines that begin with # are none.
        model: A folder that a diffusers pipeline of Stable Diffusion 1.x, 2.x or XL was saved to, a name that is in the
            hub's cache, or a packaged model: `scenes`.
        replacement: A folder of saved replacement layers, which take the place of the model's self-attention.
        negative_prompt: What guidance leads away from; no text if not given.
        num_images: How many images of each prompt.
        height: Pixels; the size that the model was made for if not given.
        width: Pixels; the size that the model was made for if not given.
        num_inference_steps: Denoising steps of the first stage.
        guidance_scale: Classifier-free guidance, 1 for none; diffusers' default for the model if not given.
        upscale: Further stages, which draw the image anew at a larger size: how many times as long a side is after
            each, for example `2x,2x`.
        strength: How much of the image each further stage draws anew, from 0 to 1: one number for each stage, or one
            for all; 0.4 and then 0.3 if not given.
        upscale_steps: Denoising steps of the further stages, of which each takes the share that `strength` says; as
            many as in the first stage if not given.
        memory: Save memory: guidance and feed-forwards in slices, activations in place, skips on the CPU. `auto` does
            what is worth its time at a size.
        mixed_precision: Number format of the UNet and the text encoders: `auto` is bf16 where the device has
            instructions for it and float32 elsewhere; `no` is float32; or `bf16`, or `fp16`. The sampler and the VAE
            stay in float32.
        seed: Image i depends on (seed, i) alone, not on the batch size or the number of processes.
        batch_size: Images at a time in each process in the first stage; as many pixels in further ones, one image at
            the least. If not given, 4, or fewer of images that are larger than the model was made for.
        out: A `.png` file for one grid, or a folder for single PNGs and prompts.csv.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    """

    prompt: list[str] = field(default_factory=list)
    prompts: str | None = None
    model: str = "scenes"
    replacement: str | None = None
    negative_prompt: str | None = None
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    upscale: list[str] = field(default_factory=list)
    strength: list[float] | None = None
    upscale_steps: list[int] | None = None
    memory: Literal["auto", "on", "off"] = "auto"
    mixed_precision: MixedPrecision = "auto"
    seed: int = 0
    batch_size: int | None = None
    out: str = "generated.png"
    device: str = "auto"

    def __post_init__(self) -> None:
        given = bool(self.prompt) or self.prompts is not None
        require(given, "prompt", None, "a text in quotes, or --prompts with a file of them")
        require(all(text.strip() for text in self.prompt), "prompt", self.prompt, "texts")
        for name in ("num_images", "batch_size", "height", "width"):
            if (value := getattr(self, name)) is not None:
                require(value >= 1, name, value, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        check_num_inference_steps(self.num_inference_steps)
        check_guidance(1 if self.guidance_scale is None else self.guidance_scale, (0, 1))
        self._check_ladder()
        self.check_out()
        self.model = absolute(self.model, PACKAGED_TEXT_TO_IMAGE)

    @property
    def factors(self) -> list[float]:
        """How many times as long a side is after each further stage."""
        return [float(factor.removesuffix("x")) for factor in self.upscale]

    def _check_ladder(self) -> None:
        for factor in self.upscale:
            right = re.fullmatch(r"[0-9]+(\.[0-9]+)?x?", factor) and float(factor.removesuffix("x")) > 1
            require(bool(right), "upscale", self.upscale, "factors above 1, as in 2x,1.5x")
        for name in ("strength", "upscale_steps"):
            values = getattr(self, name)
            if values is None:
                continue
            if not self.upscale:
                raise InputError("there is no further stage", argument=name, value=values, remedy="give --upscale")
            count = len(self.upscale)
            require(len(values) in (1, count), name, values, f"one value, or one for each of the {count} stages")
        for strength in self.strength or ():
            require(0 < strength <= 1, "strength", self.strength, "numbers above 0, up to 1")
        for steps in self.upscale_steps or ():
            require(steps >= 1, "upscale_steps", self.upscale_steps, "1 or more")
