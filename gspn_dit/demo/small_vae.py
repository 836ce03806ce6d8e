"""Train a small VAE: `gspn-dit small-vae --data IMAGES --image-size 128 --out FOLDER`.

AutoencoderKLs of 4 latent channels at a quarter of the image's side, without attention; all but the digits' are for
images of any size. `--data digits`, `--data photos` and `--data scenes` make the packaged ones.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("small-vae", prog="python -m gspn_dit.demo.small_vae")
    raise SystemExit

import math
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from gspn_dit.autoencoder.quality import psnr, reconstruction_error
from gspn_dit.autoencoder.vae import encode_moments
from gspn_dit.data.image_folder import SUFFIXES, centre_crop, find_images, say_left_out, to_rgb
from gspn_dit.data.images import ImageDataset
from gspn_dit.demo.digits import IMAGE_SIZE, Digits
from gspn_dit.demo.linear_start import start_linear
from gspn_dit.demo.photos import Photos
from gspn_dit.demo.scenes import IMAGE_SIZE as SCENE_SIZE
from gspn_dit.demo.scenes import Scenes
from gspn_dit.errors import InputError, not_none, warn
from gspn_dit.options import require
from gspn_dit.precision import Precision, autocast, choose_precision
from gspn_dit.progress import figure, progress
from gspn_dit.storage.files import new_folder, require_new

if TYPE_CHECKING:
    from gspn_dit.commands import SmallVAEOptions as Options

BATCH_SIZE = 100


class DigitShifts:
    """The 4,500 training digits, a batch drawn with a random shift of up to 2 pixels."""

    block_out_channels, sample_size, linear = (8, 16, 48), IMAGE_SIZE, False

    def __init__(self) -> None:
        self.images = Digits("train").images

    def batch(self, count: int) -> Tensor:
        """Random training images uint8 (count, 3, 32, 32)."""
        chosen = torch.randint(len(self.images), (count,))
        # The digits' border is 2 pixels of black, so a roll by 2 is a shift.
        down, right = torch.randint(-2, 3, (2,)).tolist()
        return self.images[chosen].roll((down, right), dims=(2, 3))

    def held_out(self) -> Iterator[tuple[str, Tensor]]:
        """Sets of images uint8 (N, 3, H, W) that training does not see, and what they are."""
        yield "500 held-out digits", Digits("test").images


class PhotoCrops:
    """Square crops of the photographs at 64 or 128 pixels, half of them mirrored, from twice enlarged to the whole."""

    # sample_size is the side of the tiles that diffusers' tiled decoding takes.
    block_out_channels, sample_size, linear = (16, 32, 64), 512, True
    sides = (64, 128)

    def __init__(self) -> None:
        self.photographs = Photos().photographs

    @cached_property
    def images(self) -> Tensor:
        """Training images that stand for all, uint8 (480, 3, 128, 128)."""
        return _stacked(Photos(image_size=128), 480)

    def batch(self, count: int) -> Tensor:
        """Random crops uint8, with equal chance (count, 3, 64, 64) or, of as many pixels, (count // 4, 3, 128, 128)."""
        small, large = self.sides
        side, count = (small, count) if torch.rand(()) < 0.5 else (large, max(count * small**2 // large**2, 1))
        return torch.stack([self._crop(side) for _ in range(count)])

    def held_out(self) -> Iterator[tuple[str, Tensor]]:
        """Sets of images uint8 (N, 3, H, W) that training does not see, and what they are."""
        for side, count in ((64, 480), (128, 160), (256, 48)):
            yield f"{count} held-out crops at {side} px", _stacked(Photos("test", side), count)

    def _draw(self) -> Image.Image:
        return self.photographs[int(torch.randint(len(self.photographs), ()))]

    def _smallest(self, photograph: Image.Image, side: int) -> float:
        """Side of the part of a photograph that is twice enlarged."""
        return side / 2

    def _crop(self, side: int) -> Tensor:
        photograph = self._draw()
        scale, x, y, mirror = torch.rand(4).tolist()
        smallest = self._smallest(photograph, side)
        length = smallest * (min(photograph.size) / smallest) ** scale
        left, top = x * (photograph.width - length), y * (photograph.height - length)
        box = (left, top, left + length, top + length)
        crop = torch.from_numpy(
            np.array(photograph.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2))
        )
        return (crop.flip(1) if mirror < 0.5 else crop).permute(2, 0, 1)


class SceneDraws:
    """The captioned scenes of the training split."""

    block_out_channels, sample_size, linear = (8, 16, 32), SCENE_SIZE, False

    def __init__(self) -> None:
        self.scenes = Scenes("train")

    @cached_property
    def images(self) -> Tensor:
        """Training images that stand for all, uint8 (1000, 3, 64, 64)."""
        return _stacked(self.scenes, 1000)

    def batch(self, count: int) -> Tensor:
        """Random training scenes uint8 (count, 3, 64, 64)."""
        return torch.stack([self.scenes[i][0] for i in torch.randint(len(self.scenes), (count,)).tolist()])

    def held_out(self) -> Iterator[tuple[str, Tensor]]:
        """Sets of images uint8 (N, 3, H, W) that training does not see, and what they are."""
        yield "500 held-out scenes", _stacked(Scenes("test"), 500)


class FolderCrops(PhotoCrops):
    """Crops of a folder's images, from twice enlarged against what `image_size` shows of them to the whole.

    A twentieth of the images, at most 100, is held out. Unreadable ones are named and left out.

    Raises :class:`InputError` if there are not two that can be read.
    """

    def __init__(self, folder: str, image_size: int) -> None:
        self.image_size, self.sides = image_size, (min(64, image_size), min(128, image_size))
        paths, others = find_images(folder)
        say_left_out(folder, others)
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(paths)).tolist()
        count = min(max(len(paths) // 20, 1), 100)
        self._held_out, self._paths = ([paths[i] for i in some] for some in (order[:count], order[count:]))
        if not len(self.images) or not len(next(self.held_out())[1]):
            raise InputError(
                argument="data",
                value=folder,
                wanted="a folder of two images or more that can be read, at any depth",
                remedy=f"it has {len(paths)} ending in {' '.join(SUFFIXES)}",
            )

    @cached_property
    def images(self) -> Tensor:
        """Training images that stand for all, uint8 (N, 3, image_size, image_size)."""
        return self._squares(self._paths)

    def held_out(self) -> Iterator[tuple[str, Tensor]]:
        """The images uint8 (N, 3, H, W) that training does not see, and what they are."""
        images = self._squares(self._held_out)
        yield f"{len(images)} held-out images at {self.image_size} px", images

    def _draw(self) -> Image.Image:
        while True:  # `images` has found one that can be read
            if (image := self._read(self._paths[int(torch.randint(len(self._paths), ()))])) is not None:
                return image

    def _smallest(self, photograph: Image.Image, side: int) -> float:
        return min(photograph.size) * side / self.image_size / 2

    def _squares(self, paths: Sequence[str]) -> Tensor:
        """Centre crops of the first images that can be read, no more pixels than 480 of 128 a side have."""
        most = max(480 * 128**2 // self.image_size**2, 8)
        images = islice((image for image in map(self._read, paths) if image is not None), most)
        squares = [torch.from_numpy(np.array(centre_crop(image, self.image_size))).permute(2, 0, 1) for image in images]
        return torch.stack(squares) if squares else torch.empty(0)

    def _read(self, path: str) -> Image.Image | None:
        try:
            with Image.open(path) as image:
                return to_rgb(image)
        except Exception as error:  # Pillow's decoders raise a different class for each way a file can be broken
            _say_unreadable(f"{path}: {' '.join(str(error).split())}")
            return None


@cache
def _say_unreadable(what: str) -> None:
    warn(f"unreadable image, left out: {what}")


Drawn: TypeAlias = DigitShifts | PhotoCrops | SceneDraws
RECIPES = {
    "digits": {"steps": 3500, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 0, "mixed_precision": "no"},
    "photos": {"steps": 3600, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 100, "mixed_precision": "auto"},
    "scenes": {"steps": 2500, "batch_size": 12, "learning_rate": 3e-3, "warmup_steps": 100, "mixed_precision": "no"},
}
PACKAGED: dict[str, type[Drawn]] = {"digits": DigitShifts, "photos": PhotoCrops, "scenes": SceneDraws}


def open_crops(data: str, image_size: int | None) -> Drawn:
    """What a VAE is trained on: a packaged data set or a folder of images. Raises :class:`InputError`."""
    if data in PACKAGED:
        return PACKAGED[data]()
    require(Path(data).is_dir(), "data", data, f"{', '.join(PACKAGED)} or a folder of images that exists")
    require(image_size is not None, "image_size", None, "a multiple of 4 pixels from 16; a folder of images needs it")
    return FolderCrops(data, not_none(image_size))


def _stacked(images: ImageDataset, count: int) -> Tensor:
    """The first images, uint8 (count, 3, H, W)."""
    return torch.stack([images[i][0] for i in range(count)])


def main(options: Options) -> None:
    """Train the VAE of a data set and print its reconstruction error on images it did not see.

    The latents are made easy to diffuse: the KL term keeps them near a unit Gaussian, and the decoder is trained on
    noisy latents, so that what a diffusion model leaves unfinished still decodes to a clean image.
    """
    out = Path(options.out)
    require_new(out)
    for key, value in RECIPES.get(options.data, RECIPES["photos"]).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    torch.manual_seed(options.seed)
    source = open_crops(options.data, options.image_size)
    vae = new_vae(source)
    precision = choose_precision(not_none(options.mixed_precision), vae.device)
    precision.say()
    train(vae, source, options, precision)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=scaling_factor(vae, source.images))
    errors = [(name, reconstruction_error(vae, batches(images))) for name, images in source.held_out()]
    with new_folder(out) as folder:
        vae.save_pretrained(folder)
    print(f"{out}: scaling factor {vae.config.scaling_factor:.4f}")
    for name, error in errors:
        print(f"{name}, pixels in [0, 1]: mean squared error {error:.6f}, PSNR {psnr(error):.2f} dB")


def new_vae(source: Drawn) -> AutoencoderKL:
    """A VAE for a data set that has learned nothing yet."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=source.block_out_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=source.sample_size,
    )
    if source.linear:
        start_linear(vae)
    return vae


def train(vae: AutoencoderKL, source: Drawn, options: Options, precision: Precision) -> None:
    """Fit the VAE to batches of the source."""
    steps, batch_size = not_none(options.steps), not_none(options.batch_size)  # which the recipe has filled in
    optimizer = torch.optim.AdamW(vae.parameters(), lr=not_none(options.learning_rate), weight_decay=0.0)
    schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if options.warmup_steps:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / options.warmup_steps, total_iters=options.warmup_steps)
        schedule = torch.optim.lr_scheduler.ChainedScheduler([rise, schedule])
    bar = progress(range(steps), desc=f"{options.data} VAE", unit="step")
    for _ in bar:
        pixels = source.batch(batch_size) / 127.5 - 1
        with autocast(vae.device, precision.name):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.randn_like(posterior.std)
            latents = latents + options.latent_noise * latents.detach().std() * torch.randn_like(latents)
            decoded = vae.decode(latents).sample.float()
        reconstruction = F.mse_loss(decoded, pixels) + 0.1 * F.l1_loss(decoded, pixels)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction + options.kl_weight * kl

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown = f"reconstruction {figure(reconstruction.item())}, kl {figure(kl.item())}"
        bar.set_postfix_str(shown, refresh=False)


def scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """1 / the standard deviation of sampled latents of the images: what brings them to unit variance."""
    moments = torch.cat([encode_moments(vae, batch) for batch in batches(images)])
    mean, logvar = moments.chunk(2, dim=1)
    return 1 / math.sqrt(mean.var().item() + logvar.exp().mean().item())


def batches(images: Tensor) -> Sequence[Tensor]:
    """A hundred images at a time, of large ones fewer."""
    return images.split(max(1, min(BATCH_SIZE, BATCH_SIZE * 256**2 // math.prod(images.shape[2:]))))
