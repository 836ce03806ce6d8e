"""The stages of an image: drawn at one size, and then, on a ladder, drawn anew at larger ones from what there is.

A stage of the ladder is image-to-image (SDEdit, arXiv 2108.01073) through pixels: the latents are decoded, the image is
enlarged, and it is encoded, which keeps edges where enlarged latents would blur them or ring. Then noise of the stage's
strength is added, and removed at the new size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.inference.decoding import decode_images, encode_image

STRENGTHS = (0.4, 0.3)  # of the first stage of a ladder, and of all after it


@dataclass(frozen=True)
class Stage:
    """One stage of every image.

    Args:
        height: Pixels, as the width.
        width: A multiple of the VAE's factor.
        num_inference_steps: Steps from pure noise.
        strength: Share of them that is taken; 1 of the first stage, which begins with noise.
    """

    height: int
    width: int
    num_inference_steps: int
    strength: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


def ladder(
    first: Stage,
    factor: int,
    upscale: Sequence[float],
    strengths: Sequence[float] | None,
    steps: Sequence[int] | None,
) -> list[Stage]:
    """All stages of an image.

    Args:
        first: The stage that begins with noise.
        factor: The VAE's: pixels a side that one latent stands for.
        upscale: How many times as long a side is after each further stage.
        strengths: Of the further stages, one for each or one for all; None takes STRENGTHS.
        steps: As strengths; None takes the first stage's.

    Raises :class:`InputError` for sizes that are no multiples of the factor, or a stage without a step.
    """
    stages = [first]
    _check_size(first, factor, "height and width")
    ours = strengths or [STRENGTHS[0], *[STRENGTHS[1]] * (len(upscale) - 1)]
    each = zip(upscale, _one_each(ours, upscale), _one_each(steps or [first.num_inference_steps], upscale), strict=True)
    for times, strength, n in each:
        height, width = (side * Fraction(str(times)) for side in stages[-1].size)  # 200 × 1.1 is no whole float
        stage = Stage(round(height), round(width), n, strength)
        if (height, width) != stage.size:
            raise InputError(
                f"{stages[-1].width}×{stages[-1].height} pixels become {float(width):g}×{float(height):g}",
                argument="upscale",
                value=list(upscale),
                wanted="whole sides",
            )
        _check_size(stage, factor, "upscale")
        if int(n * strength) < 1:
            raise InputError(
                f"of {n} steps it takes none", argument="strength", value=strength, remedy="raise it, or upscale_steps"
            )
        stages.append(stage)
    return stages


def stage_noise(seed: int, i: int, stage: int) -> torch.Generator:
    """The CPU generator of every random number of image i in a stage; in stage 0 `image_generator(seed, i)`."""
    if stage:
        seed = int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])
    return image_generator(seed, i)


def enlarged(vae: AutoencoderKL, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents (B, C, h', w') of the images of latents (B, C, h, w), enlarged to (height, width) pixels.

    The resampling is Lanczos', on the CPU: it is the same on every machine.
    """
    images = decode_images(vae, latents, "uint8").permute(0, 2, 3, 1).cpu().numpy()
    large = (Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS) for image in images)
    return torch.cat([encode_image(vae, torch.from_numpy(np.array(image)).permute(2, 0, 1)) for image in large])


def _one_each(values: Sequence, stages: Sequence) -> list:
    """One value for each stage: as they come, or one for all."""
    return list(values) * (len(stages) if len(values) == 1 else 1)


def _check_size(stage: Stage, factor: int, argument: str) -> None:
    if stage.height % factor or stage.width % factor:
        raise InputError(
            f"{stage.width}×{stage.height} pixels", argument=argument, wanted=f"multiples of {factor}, the VAE's factor"
        )
