"""The safety checker that a Stable Diffusion pipeline may have: it is asked of every image."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from gspn_dit.inference.prompts import TextToImagePipeline


def is_unsafe(pipe: TextToImagePipeline, image: Tensor) -> bool:
    """Whether a pipeline's safety checker finds an image, uint8 (3, H, W), unfit; False where it has none."""
    checker = getattr(pipe, "safety_checker", None)
    if checker is None:
        return False
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    seen = pipe.feature_extractor(picture, return_tensors="pt").pixel_values.to(checker.device, checker.dtype)
    _, found = checker(images=np.zeros((1, 1, 1, 3)), clip_input=seen)  # it blackens what it is given: nothing here
    return bool(found[0])
