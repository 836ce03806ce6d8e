"""Runs made in an instant: real models and a real AutoencoderKL, tiny and at random weights."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from gspn_dit.config import Config, DataConfig, DiffusionConfig, ModelConfig, SamplingConfig
from gspn_dit.diffusion import create_scheduler
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.models import create_model
from gspn_dit.storage.run_folder import RunFolder

CLASS_NAMES = ["golden retriever", "tabby cat", "goldfish"]


def tiny_vae() -> AutoencoderKL:
    """A 2× down AutoencoderKL with 4 latent channels."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def tiny_model(name: str, objective: str) -> torch.nn.Module:
    """A model of 3 classes on 8×8 latents whose answer depends on all its inputs: no layer is zero."""
    torch.manual_seed(0)
    model = create_model(name, sample_size=8, num_classes=3, out_channels=8 if objective == "ddpm" else 4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape))
    return model


def make_run(
    folder: Path,
    name: str = "gspn-dit-ti-2",
    objective: str = "flow",
    steps: tuple[int, ...] = (2,),
    class_dropout: float = 0.1,
) -> Path:
    """A run's folder as training leaves it, with a checkpoint at each of the steps."""
    tiny_vae().save_pretrained(folder / "vae")
    config = Config(
        output_dir=str(folder),
        model=ModelConfig(name),
        data=DataConfig(source="digits", vae=str(folder / "vae"), image_size=16),
        diffusion=DiffusionConfig(objective, class_dropout=class_dropout),
        sampling=SamplingConfig(num_inference_steps=3, guidance_scale=2.0, guidance_interval=(0.1, 0.9)),
    )
    config.save(folder / "config.yaml")
    (folder / "class_names.json").write_text(json.dumps(CLASS_NAMES))
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:07d}"
        model = tiny_model(name, objective)
        with torch.no_grad():
            next(model.parameters()).add_(0.01 * step)  # so that checkpoints differ
        model.save_pretrained(checkpoint / "ema")
        config.save(checkpoint / "config.yaml")
        (checkpoint / "class_names.json").write_text(json.dumps(CLASS_NAMES))
        (checkpoint / "metadata.json").write_text(json.dumps({"step": step}))
    return folder


def pipeline(name="gspn-dit-ti-2", objective="flow", **options) -> GSPNDiTPipeline:
    pipe = GSPNDiTPipeline(
        tiny_model(name, objective), tiny_vae(), create_scheduler(objective), **{"class_names": CLASS_NAMES} | options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def list_checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return [checkpoint.path for checkpoint in RunFolder(Path(run)).list_checkpoints()]


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))
