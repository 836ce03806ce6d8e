"""The typed configuration of the training of a text-to-image model of Stable Diffusion's architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gspn_dit.arguments import check_guidance, check_num_inference_steps
from gspn_dit.config import DataConfig, RunConfig, TrainingConfig
from gspn_dit.options import require
from gspn_dit.storage.packaged import PACKAGED_TEXT_ENCODERS, PACKAGED_TOKENIZERS, absolute


@dataclass
class TextToImageModelConfig:
    """Model: a UNet, a text encoder and a tokenizer, of given sizes or of a saved pipeline.

    Args:
        unet: Options of diffusers' UNet2DConditionModel, for example `{block_out_channels: [64, 128]}`; what is not
            given is as in Stable Diffusion 1.
        text_encoder: Options of transformers' CLIPTextConfig, for example `{hidden_size: 128, num_hidden_layers: 3}`;
            what is not given is as in Stable Diffusion 1, in the proportions of `hidden_size`.
        text_encoder_from: A packaged text encoder (`scenes`) or a folder of a saved CLIPTextModel to begin with, in
            place of options.
        train_text_encoder: Train the text encoder with the UNet; false leaves it as it begins.
        tokenizer: A packaged tokenizer (`scenes`: CLIP's vocabulary) or a folder of a saved CLIPTokenizer; if not
            given, that of `base`, or `scenes`.
        base: A folder of a saved StableDiffusionPipeline whose weights a new run begins with, in place of options of
            the UNet and the text encoder.
    """

    unet: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    text_encoder_from: str | None = None
    train_text_encoder: bool = True
    tokenizer: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.base is not None:
            self.base = absolute(self.base)
        if self.text_encoder_from is not None:
            self.text_encoder_from = absolute(self.text_encoder_from, PACKAGED_TEXT_ENCODERS)
        if self.tokenizer is not None:
            self.tokenizer = absolute(self.tokenizer, PACKAGED_TOKENIZERS)
        for key in ("unet", "text_encoder"):
            none = self.base is None or not getattr(self, key)
            require(none, f"model.{key}", getattr(self, key), "no options beside model.base, which has them")
        alone = self.text_encoder_from is None or not self.text_encoder
        require(alone, "model.text_encoder", self.text_encoder, "no options beside model.text_encoder_from")


@dataclass
class CaptionedDataConfig(DataConfig):
    """Data: captioned images, or latents with the tokens of captions, and the VAE of the latents.

    Args:
        source: A captioned named source (`scenes`), a folder of captioned images, or a store made by
            `gspn-dit encode --tokenizer …`.
        vae: A packaged VAE (`digits`, `photos`), or a hub name or a local folder of a diffusers AutoencoderKL.
        image_size: Side of the square images in pixels.
        horizontal_flip: Mirror half of the images, at random; captions that say left or right are then wrong.
        exif_orientation: Turn a folder's images as their EXIF orientation says.
        num_workers: Processes that read data, per training process; 0 reads in the training process itself. If not
            given, one for each core, up to 4.
        sample_posterior: Draw latents from the VAE's posterior, as Stable Diffusion does; false takes its mean, which
            is the easier to learn where the posterior is wide, as a small VAE's is of plain backgrounds.
    """

    source: str = "data/captioned-latents"
    vae: str = "stabilityai/sd-vae-ft-mse"
    image_size: int = 512
    horizontal_flip: bool = False
    sample_posterior: bool = True


@dataclass
class TextToImageDiffusionConfig:
    """Objective: what the model learns to predict, with or without captions.

    Args:
        prediction_type: `epsilon`, the noise, or `v_prediction`, the velocity; if not given, that of `model.base`, or
            `epsilon`. The chain is that of `model.base`, or Stable Diffusion's.
        min_snr_gamma: Weigh the error of clean latents by min(SNR, this), SNR the signal-to-noise ratio; null for the
            plain mean squared error of what is predicted.
        caption_dropout: Share of captions replaced by the empty one, for classifier-free guidance.
    """

    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    min_snr_gamma: float | None = None
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        share = self.caption_dropout
        require(0 <= share <= 1, "diffusion.caption_dropout", share, "a share from 0 to 1")
        gamma = self.min_snr_gamma
        require(gamma is None or gamma > 0, "diffusion.min_snr_gamma", gamma, "a positive number, or null")


@dataclass
class PromptSamplingConfig:
    """Sampling: how a run's sample grids are drawn.

    Args:
        prompts: What they show, an image each; if not given, the captions of the first images of the data.
        num_images: How many captions of the data, where no prompts are given.
        sampler: `ddim` or `dpm++`.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
    """

    prompts: list[str] = field(default_factory=list)
    num_images: int = 16
    sampler: Literal["ddim", "dpm++"] = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        require(self.num_images >= 1, "sampling.num_images", self.num_images, "1 or more")
        check_num_inference_steps(self.num_inference_steps, "sampling.")
        check_guidance(self.guidance_scale, (0.0, 1.0), "sampling.")


@dataclass
class TextToImageConfig(RunConfig):
    """Run: everything that `train-t2i` needs, written beside its checkpoints as config.yaml.

    Args:
        model: The UNet, the text encoder and the tokenizer.
        data: Captioned images or latents, and their VAE.
        diffusion: The objective.
        training: Steps, optimiser, averages, and what is written when.
        sampling: How sample grids are drawn.
    """

    model: TextToImageModelConfig = field(default_factory=TextToImageModelConfig)
    data: CaptionedDataConfig = field(default_factory=CaptionedDataConfig)
    diffusion: TextToImageDiffusionConfig = field(default_factory=TextToImageDiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: PromptSamplingConfig = field(default_factory=PromptSamplingConfig)

    @property
    def draws(self) -> bool:
        """Whether images are drawn on the way."""
        return bool(self.training.sample_every)
