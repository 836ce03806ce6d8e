"""The model card of an exported run: README.md as the Hub reads it, its front matter first."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gspn_dit.errors import InputError
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.run_description import read_config
from gspn_dit.storage.run_folder import Checkpoint

GRID_FILE = "samples.png"
SCORES = ("fid", "fd", "sfid", "inception_score", "classifier_score", "precision", "recall", "class_accuracy")
# what the scores in metrics.json were computed with
OF_THE_SCORES = (
    "features",
    "reference",
    "reference_statistics",
    "inception_score_convention",
    "classifier_score_convention",
)


def model_card(pipe: GSPNDiTPipeline, checkpoint: Checkpoint | None, origin: str | None = None) -> str:
    """What the model is, how to use it, and how it was trained and scored, as Markdown.

    Args:
        pipe: What is exported.
        checkpoint: Where it comes from, in its run's folder; None if that is not known.
        origin: Of weights that others have published, their file or folder; then there is no grid.
    """
    config = read_config(checkpoint.config) if checkpoint else None
    metrics = checkpoint_metrics(checkpoint) if checkpoint else {}
    title = config["model"]["name"] if config else type(pipe.transformer).__name__
    front = {
        "library_name": "gspn-dit",  # diffusers alone does not know the pipeline's class
        "tags": ["text-to-image"] if pipe.subject == "prompt" else ["image-generation", "class-conditional"],
        "metrics": [name for name in SCORES if name in metrics] or None,
    }
    parts = [
        f"---\n{_yaml({key: value for key, value in front.items() if value})}---",
        f"# {title}",
        _summary(pipe, config, checkpoint),
        _usage(pipe),
    ]
    if origin is None:
        parts.insert(2, f"![Samples]({GRID_FILE})")
    else:
        parts[2] += f" Converted by `gspn-dit export` from `{origin}`; its licence is that of those weights."
    if metrics:
        rows = [f"| {name} | {value if isinstance(value, str) else f'{value:g}'} |" for name, value in metrics.items()]
        parts.append("\n".join(["## Metrics", "", "| | |", "|---|---|", *rows]))
    if config:
        parts.append(f"## Configuration\n\n```yaml\n{_yaml(portable(config))}```")
    return "\n\n".join(parts) + "\n"


def stable_diffusion_card(checkpoint: Checkpoint, has_grid: bool) -> str:
    """What an exported StableDiffusionPipeline is, how to use it, and how it was trained, as Markdown.

    Args:
        checkpoint: Where it comes from.
        has_grid: Whether its grid of samples lies beside.
    """
    front = {"library_name": "diffusers", "tags": ["text-to-image", "stable-diffusion"]}
    parts = [
        f"---\n{_yaml(front)}---",
        "# Text to image",
        f"The averaged weights of step {checkpoint.read_metadata()['step']:,} of a training by `gspn-dit train-t2i`.",
        """```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/of/this/folder")
image = pipe("what it is to show").images[0]
```""",
        f"## Configuration\n\n```yaml\n{_yaml(portable(read_config(checkpoint.config)))}```",
    ]
    if has_grid:
        parts.insert(2, f"![Samples]({GRID_FILE})")
    return "\n\n".join(parts) + "\n"


def checkpoint_metrics(checkpoint: Checkpoint) -> dict[str, float | str]:
    """The figures that a run's folder has of one of its checkpoints.

    From metrics.csv and evaluation.csv the lines of its step; from metrics.json, as an evaluation writes it, all
    numbers and what they are of, but only for the newest checkpoint, and not if the file is older than that.
    """
    run = checkpoint.run
    metrics: dict[str, Any] = {}  # what the files say, of which figures are picked below
    if run is None:  # a copy of one, by itself
        return {}
    for table in (run.metrics, run.evaluation):
        for row in _rows(table):
            if row.get("step") == str(checkpoint.step):
                metrics |= {("training_loss" if key == "loss" else key): _number(text) for key, text in row.items()}
    evaluated, written = run.scores, checkpoint.metadata.stat().st_mtime
    if checkpoint == run.newest_checkpoint() and evaluated.is_file() and evaluated.stat().st_mtime >= written:
        try:
            metrics |= dict(json.loads(evaluated.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{evaluated} is damaged ({error})", remedy="evaluate again, or remove it") from error
    speed = ("step", "learning_rate", "grad_norm", "images_per_second")
    figures = {key: value for key, value in metrics.items() if key not in speed and _is_figure(value)}
    return figures | {key: _plain(metrics[key]) for key in OF_THE_SCORES if isinstance(metrics.get(key), str)}


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without this machine's paths: a local file or folder goes by its last name."""
    return _plain({key: value for key, value in config.items() if key not in ("output_dir", "resume")})


def _summary(pipe: GSPNDiTPipeline, config: Mapping[str, Any] | None, checkpoint: Checkpoint | None) -> str:
    names, transformer = pipe.config.class_names, pipe.transformer
    height, width = pipe.latent_size()
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    kind = "text-to-image" if pipe.subject == "prompt" else "class-conditional"
    if pipe.subject == "prompt":
        reader = type(pipe.text_encoder).__name__ if pipe.text_encoder else "a text encoder of its own"
        classes = f"text read by {reader}"
    else:
        classes = f"{transformer.config.num_classes} classes"
    if names:
        classes += f" ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"
    trained = ""
    if config and checkpoint and checkpoint.metadata.is_file():
        step = checkpoint.read_metadata()["step"]
        trained = (
            f" Trained with the {config['diffusion']['objective']} objective for {step:,} steps of "
            f"{config['training']['batch_size']} images on `{portable(config)['data']['source']}`; averaged weights."
        )
    return (
        f"A {kind} latent diffusion model: {type(transformer).__name__} of the package `gspn-dit`, "
        f"{parameters / 1e6:.1f} M parameters, {classes}, latents of {height}×{width}.{trained}"
    )


def _usage(pipe: GSPNDiTPipeline) -> str:
    if pipe.subject == "prompt":
        asked = f"prompt={(pipe.config.prompts or ['what it is to show'])[:1] * 2},"
    else:
        asked = f"class_labels={[0, min(1, pipe.transformer.config.num_classes - 1)]},  # ids or names"
    return f"""## Use

```python
from gspn_dit import GSPNDiTPipeline
from gspn_dit.diffusion import image_generator

pipe = GSPNDiTPipeline.from_pretrained("this folder or repository")
images = pipe(
    {asked}
    guidance_scale={pipe.config.guidance_scale},
    num_inference_steps={pipe.config.num_inference_steps},
    generator=[image_generator(0, i) for i in range(2)],  # images 0 and 1 of seed 0, as `gspn-dit sample` draws them
).images
```"""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    local = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).name if local else value


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
