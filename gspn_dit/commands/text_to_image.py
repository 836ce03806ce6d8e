"""Options of the commands for text-to-image; those of the trainings themselves are in configurations of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gspn_dit.arguments import MixedPrecision, check_guidance, check_num_inference_steps, default_workers
from gspn_dit.commands.sampling import ImagesOut
from gspn_dit.errors import InputError, not_none
from gspn_dit.evaluation.classifiers import CAPTION_ACCURACIES, check_features
from gspn_dit.options import require
from gspn_dit.registry import quoted
from gspn_dit.storage.packaged import PACKAGED_TEXT_TO_IMAGE, absolute


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
        num_workers: Processes that read pictures; 0 reads in this one. If not given, one for each core, up to 4.
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
    num_workers: int = field(default_factory=default_workers)
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


@dataclass
class GenerateOptions(ImagesOut):
    """Text to images of any size, by a Stable Diffusion pipeline, with or without replacement layers.

    Args:
        prompt: Texts, each in quotes.
        prompts: A text file of further prompts, one a line; blank lines and lines that begin with # are none. Or a
            `.jsonl`, of whose lines the `text` is the prompt.
        model: A folder that a diffusers pipeline of Stable Diffusion 1.x, 2.x or XL was saved to, a name that is in the
            hub's cache; no such model comes with the package yet.
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
        out: A `.png` file for one grid, or a folder for single PNGs and metadata.jsonl.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    """

    prompt: list[str] = field(default_factory=list)
    prompts: str | None = None
    model: str | None = None
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
        if self.negative_prompt is not None and self.guidance_scale == 1:
            raise InputError(
                "there is no guidance to lead away from it",
                argument="negative_prompt",
                value=self.negative_prompt,
                remedy="raise --guidance-scale above 1, or leave it out",
            )
        self._check_ladder()
        self.check_out()
        wanted = "a folder that a pipeline of Stable Diffusion was saved to, for none comes with the package yet"
        require(self.model is not None, "model", None, wanted)
        self.model = absolute(not_none(self.model), PACKAGED_TEXT_TO_IMAGE)

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


@dataclass
class COCOPromptsOptions:
    """Prompts: COCO's captions of some of its pictures, drawn at random, one of each picture.

    Args:
        captions: COCO's own file, `captions_val2014.json`.
        out: The `.jsonl` to write: a line of `file_name` and `text` for each picture.
        num_captions: How many. Fewer of the same seed are the first of more.
        seed: Seed of the draw.
    """

    captions: str
    out: str
    num_captions: int = 30_000
    seed: int = 0

    def __post_init__(self) -> None:
        require(Path(self.out).suffix == ".jsonl", "out", self.out, "a file name ending in .jsonl")
        require(self.num_captions >= 1, "num_captions", self.num_captions, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass
class EvaluateTextToImageOptions:
    """Evaluation: images of texts, and what they are compared with: a reference, their texts, or both.

    Args:
        samples: A folder that `generate` or `sample` wrote, or any of images with a metadata.jsonl (file_name, text).
        out: The JSON file to write.
        reference: For the Fréchet distance: a folder, an npz that `gspn-dit reference` wrote, or a named source.
        image_size: Side in pixels of the squares that the samples, and the images of a reference folder, are cropped
            and resized to for the Fréchet distance; if not given, they are taken as they are.
        clip: For the CLIP score: the folder of a CLIPModel of transformers, with its tokenizer and its image processor.
        captions: For caption accuracy: the grammar of the texts: `scenes`.
        features: Of the Fréchet distance: `inception`, or the name of a classifier: `digits`, `photos`.
        weights: Weights file of the features; if not given, the packaged one, or torch-fidelity's download.
        device: `auto` is the accelerator if there is one; each process of `accelerate launch` has its own.
    """

    samples: str
    out: str
    reference: str | None = None
    image_size: int | None = None
    clip: str | None = None
    captions: str | None = None
    features: str = "inception"
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        given = (self.reference, self.clip, self.captions)
        require(any(each is not None for each in given), "reference", None, "one of reference, clip and captions")
        known = self.captions is None or self.captions in CAPTION_ACCURACIES
        require(known, "captions", self.captions, quoted(CAPTION_ACCURACIES))
        if self.image_size is not None:
            require(self.reference is not None, "image_size", self.image_size, "a reference with it")
            require(self.image_size >= 1, "image_size", self.image_size, "1 or more")
        check_features("features", self.features)
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
        require(self.weights is None or Path(self.weights).is_file(), "weights", self.weights, "a file: no such file")
