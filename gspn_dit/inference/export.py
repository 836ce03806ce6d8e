"""What `gspn-dit export` does: a run becomes a folder that `GSPNDiTPipeline.from_pretrained` loads anywhere.

The folder is a saved :class:`~gspn_dit.inference.pipeline.GSPNDiTPipeline`: averaged weights, VAE, scheduler, class
names and the run's sampling defaults, with a model card and its grid of samples. Wherever a model is named, the folder
can be named; diffusers' own `DiffusionPipeline` does not know the class.

Published weights of DiT and SiT become such a folder, too, without a grid, which would be drawn for long.

A run of `train-t2i` becomes a `StableDiffusionPipeline`, which diffusers knows; one of `distill-t2i` a folder that
`AttentionReplacement.from_pretrained` loads.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("export", prog="python -m gspn_dit.inference.export")
    raise SystemExit

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from gspn_dit.devices import choose_device
from gspn_dit.inference.grid import draw_grid
from gspn_dit.inference.loading import find_checkpoint, is_of_others, load_pipeline
from gspn_dit.inference.model_card import GRID_FILE, model_card, stable_diffusion_card
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.replacements import export_replacement, is_replacement
from gspn_dit.inference.stable_diffusion import is_text_to_image, load_stable_diffusion
from gspn_dit.options import require
from gspn_dit.storage.files import new_folder, require_new, save_tensors
from gspn_dit.storage.run_folder import Checkpoint

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from gspn_dit.commands import ExportOptions

GRID_IMAGES = 16


def main(options: ExportOptions) -> None:
    """Write a run's newest checkpoint, or published weights, as a saved pipeline."""
    out = Path(options.out)
    require_new(out)
    checkpoint = find_checkpoint(options.model)
    if checkpoint is not None and is_text_to_image(checkpoint):
        export_stable_diffusion(checkpoint, out, options.vae)
        print(f"{options.model} as a StableDiffusionPipeline: {out}")
        return
    if checkpoint is not None and is_replacement(checkpoint):
        require(options.vae is None, "vae", options.vae, "none: replaced layers have no VAE")
        export_replacement(checkpoint, out)
        print(f"{options.model} as replaced layers, to be mounted on their base model: {out}")
        return
    pipeline = load_pipeline(checkpoint or options.model, options.vae, options.convention)
    origin = None
    if checkpoint is None and is_of_others(options.model):
        origin = _name_of(Path(options.model)) if os.path.exists(options.model) else options.model
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
    require_new(out, sum(part.get_memory_footprint() for part in parts if part is not None))
    with new_folder(out) as folder:
        pipeline.save_pretrained(folder)
        _suit_older_transformers(pipeline, folder)
        for path in folder.rglob("*.json"):
            _forget_origin(path)
        if origin is None:
            save_samples(pipeline, checkpoint, folder / GRID_FILE)
        (folder / "README.md").write_text(model_card(pipeline, checkpoint, origin))
    print(f"{options.model} as a pipeline: {out}")


def _name_of(place: Path) -> str:
    """What a file or folder of weights is called; a transformer's folder says too little, and its pipeline's more."""
    place = Path(os.path.abspath(place))  # not where a link of the cache leads
    return f"{place.parent.name}/{place.name}" if place.name == "transformer" else place.name


def export_stable_diffusion(checkpoint: Checkpoint, out: Path, vae: str | None) -> None:
    """Write a checkpoint of `train-t2i` as a pipeline that diffusers alone loads."""
    pipe = load_stable_diffusion(checkpoint, vae)
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    require_new(out, sum(p.numel() * p.element_size() for part in parts for p in part.parameters()))
    with new_folder(out) as folder:
        pipe.save_pretrained(folder)
        _suit_older_transformers(pipe, folder)
        for path in folder.rglob("*.json"):
            _forget_origin(path)
        drawn = checkpoint.run.samples(checkpoint.step) if checkpoint.run else None
        if drawn is not None and drawn.is_file():
            shutil.copyfile(drawn, folder / GRID_FILE)
        (folder / "README.md").write_text(stable_diffusion_card(checkpoint, has_grid=(folder / GRID_FILE).is_file()))


def save_samples(pipe: GSPNDiTPipeline, checkpoint: Checkpoint | None, path: Path) -> None:
    """The grid that training drew at a checkpoint, or one that is drawn now."""
    if checkpoint and (run := checkpoint.run) and (drawn := run.samples(checkpoint.step)).is_file():
        shutil.copyfile(drawn, path)
        return
    pipe.set_progress_bar_config(desc=path.name, disable=None)
    draw_grid(pipe.to(choose_device()), path, count=GRID_IMAGES, seed=0)


def _suit_older_transformers(pipe: StableDiffusionPipeline | GSPNDiTPipeline, folder: Path) -> None:
    """Write a saved CLIPTextModel and a CLIP tokenizer as transformers 4 reads them, too: 5 has other names and files.

    Nothing is done where there is none.
    """
    if type(pipe.text_encoder).__name__ == "CLIPTextModel":
        from transformers.utils import SAFE_WEIGHTS_NAME

        path = folder / "text_encoder" / SAFE_WEIGHTS_NAME
        tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
        save_tensors(tensors, path, {"format": "pt"})
    is_clip = type(pipe.tokenizer).__name__.startswith("CLIPTokenizer")
    if is_clip and not (folder / "tokenizer" / "vocab.json").is_file():
        pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt


def _forget_origin(path: Path) -> None:
    """diffusers notes in each config where on this machine it was loaded from: nobody else's business."""
    values = json.loads(path.read_text())
    if values.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(values, indent=2) + "\n")
