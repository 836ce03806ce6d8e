"""CLIP score: how well images agree with their texts, by a CLIP model of transformers (arXiv 2104.08718)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.errors import InputError, machine_fault, renamed
from gspn_dit.evaluation.features import observe
from gspn_dit.evaluation.image_sets import ImageSet
from gspn_dit.extras import require_extras
from gspn_dit.processes import ALONE, Processes
from gspn_dit.text.encoder import without_bars
from gspn_dit.text.tokens import load_tokenizer, tokenize

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CLIP:
    """A CLIP model with what prepares its images and its texts.

    Args:
        model: In eval mode and float32, on its device.
        tokenizer: With `model_max_length` set; longer texts are cut.
        processor: Resizes, crops and normalises pictures as the model knows them.
    """

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    processor: CLIPImageProcessor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def prepare(self, image: Tensor) -> Tensor:
        """A uint8 image (3, H, W) as the model takes it, (3, side, side)."""
        picture = np.asarray(image.permute(1, 2, 0))
        prepared = self.processor(images=picture, input_data_format="channels_last", return_tensors="pt")
        return prepared["pixel_values"][0]

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The `embedding` (B, D) of prepared images (B, 3, side, side)."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
            return {"embedding": self.model.visual_projection(pooled)}

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """The embeddings (B, D) of texts."""
        pooled = self.model.text_model(input_ids=tokenize(self.tokenizer, texts).to(self.device)).pooler_output
        return self.model.text_projection(pooled)


def load_clip(folder: str | os.PathLike, device: torch.device | str = "cpu") -> CLIP:
    """The CLIP of a folder; nothing is downloaded.

    Args:
        folder: A CLIPModel that transformers saved, with its tokenizer and preprocessor_config.json.
        device: Where it is to be.

    Raises:
        InputError: There is none, a part of it is missing, or the parts do not fit each other.
    """
    require_extras("t2i")
    from transformers import CLIPImageProcessor, CLIPModel

    place, about = Path(folder), {"argument": "clip", "value": os.fspath(folder)}
    for name in ("config.json", "preprocessor_config.json"):
        if not (place / name).is_file():
            raise InputError(f"no {name} there", **about, wanted="the folder of a CLIPModel of transformers")
    try:
        if (kind := json.loads((place / "config.json").read_text()).get("model_type")) != "clip":
            raise InputError(f"is a model of type {kind!r}", **about, wanted="a CLIPModel of transformers")
        with without_bars():
            model, info = CLIPModel.from_pretrained(str(place), local_files_only=True, output_loading_info=True)
        processor = CLIPImageProcessor.from_pretrained(str(place), local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # safetensors has an exception of its own for damaged files
        if machine_fault(error) is not None:
            raise
        raise InputError(f"it cannot be read ({' '.join(str(error).split())[:200]})", **about) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{len(missing)} of its weights are not there, such as {missing[0]}", **about)
    with renamed(tokenizer="clip", max_length="clip"):
        tokenizer = load_tokenizer(place, model.config.text_config.max_position_embeddings)
    clip = CLIP(model.float().eval().to(device), tokenizer, processor)
    side = model.config.vision_config.image_size
    if (prepared := tuple(clip.prepare(torch.zeros(3, 16, 24, dtype=torch.uint8)).shape)) != (3, side, side):
        raise InputError(f"its processor makes {prepared} of an image, not {(3, side, side)}", **about)
    return clip


def clip_score(images: ImageSet, texts: Sequence[str], clip: CLIP, processes: Processes = ALONE) -> float:
    """The mean over images of the cosine of the image's and its text's embedding, neither clipped at 0 nor scaled.

    Args:
        images: Of any one size.
        texts: One for each.
        clip: What embeds both.
        processes: Who shares the work; all of them call this alike.
    """
    side = clip.model.config.vision_config.image_size
    prepared = ImageSet(images.source, len(images), (side, side), lambda i: clip.prepare(images.read(i)))
    cosines = _Cosines(texts, clip)
    observe(prepared, clip, [("embedding", cosines)], processes)
    return cosines.total / len(images)


class _Cosines:
    """The sum of images' cosines with their texts."""

    def __init__(self, texts: Sequence[str], clip: CLIP) -> None:
        self.texts, self.clip, self.total = texts, clip, 0.0

    def update(self, indices: Tensor, values: Tensor) -> None:
        embedded = self.clip.embed([self.texts[i] for i in indices.tolist()])
        self.total += F.cosine_similarity(values, embedded).sum().item()

    def combine(self, processes: Processes) -> None:
        self.total = processes.total(torch.tensor(self.total, dtype=torch.float64)).item()
