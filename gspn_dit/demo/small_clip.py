"""Train the small text encoder of scenes by contrast with pictures: `gspn-dit small-clip --out FOLDER`.

A text encoder that begins from nothing learns from a diffusion model's loss which colours a caption names, and little
else: what stands where hardly changes that loss. So, as Stable Diffusion's, this one is trained first, as CLIP is
(arXiv 2103.00020): a picture is to be nearer to its own caption than to those of others. Captions that are contrary in
one respect are among those others (arXiv 2210.01936), without which bags of words would do.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("small-clip", prog="python -m gspn_dit.demo.small_clip")
    raise SystemExit

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.demo.scenes import Scenes, contrary, parse_caption
from gspn_dit.models.text_to_image import text_encoder
from gspn_dit.progress import figure, progress
from gspn_dit.storage.files import new_folder, require_new
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS
from gspn_dit.text.tokens import load_tokenizer, tokenize

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

    from gspn_dit.commands import SmallCLIPOptions as Options

TOKENS = 18  # the longest caption of a scene has as many
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
CONTRARY = 2  # captions for each picture that are not true of it
SHARPEST = 100.0  # the similarities' factor stays below it, as CLIP's


class SmallCLIP(nn.Module):
    """A CLIPTextModel and a convolutional network that bring a caption and its picture to the same place.

    Args:
        tokenizer: Of the captions.
        width: Of the embeddings.

    Attributes:
        text: The CLIPTextModel.
        log_scale: Logarithm of the similarities' factor; that begins as 1 / 0.07.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int = 64) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text: CLIPTextModel = text_encoder({**SIZES, "max_position_embeddings": tokenizer.model_max_length})
        self.project_text = nn.Linear(SIZES["hidden_size"], width, bias=False)
        self.image = nn.Sequential(
            _convolution(3, 16, 5),  # 32×32
            _convolution(16, 32, 3),  # 16×16
            _convolution(32, 64, 3),  # 8×8
            _convolution(64, 96, 3),  # 4×4; what follows knows the places
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(96 * 4 * 4, 128),
            nn.SiLU(),
            nn.Linear(128, width),
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, width) of images uint8 (B, 3, 64, 64)."""
        return F.normalize(self.image(images / 127.5 - 1), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, width) of B texts."""
        return F.normalize(self.project_text(self.text(tokenize(self.tokenizer, texts)).pooler_output), dim=-1)

    def loss(self, images: Tensor, captions: Sequence[str], others: Sequence[str]) -> Tensor:
        """Mean of two cross-entropies: of a picture's caption among all texts, and of a caption's picture.

        Args:
            images: uint8 (B, 3, 64, 64).
            captions: B texts that are true of them.
            others: Texts that are true of none.
        """
        scale = self.log_scale.exp().clamp(max=SHARPEST)
        logits = scale * self.embed_images(images) @ self.embed_texts([*captions, *others]).T
        own = torch.arange(len(images))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(images)].T, own)) / 2


def main(options: Options) -> None:
    """Train a text encoder on scenes and print how well it tells those apart that it did not see."""
    out = Path(options.out)
    require_new(out)
    torch.manual_seed(options.seed)
    model = SmallCLIP(load_tokenizer(PACKAGED_TOKENIZERS["scenes"], TOKENS))
    train(model, options)
    nearest, beats = agreement(model, Scenes("test"), 1000)
    with new_folder(out) as folder:
        model.text.half().save_pretrained(folder)  # half the megabytes; a training computes with it in float32
    print(f"{out}: a CLIPTextModel of {sum(p.numel() for p in model.text.parameters()) / 1e6:.1f} M parameters")
    print(f"of 1,000 held-out scenes {nearest:.1%} are nearest to their own caption among all,")
    print(f"{beats:.1%} nearer to it than to one that is contrary in one respect")


def train(model: SmallCLIP, options: Options) -> None:
    """Fit the model to scenes and captions of the training split, drawn anew for every step."""
    draw, scenes = np.random.Generator(np.random.PCG64(options.seed)), Scenes("train")
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, (0.9, 0.98), weight_decay=0.01, fused=True)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=min(100, options.steps))
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([rise, fall])
    bar = progress(range(options.steps), desc="scenes CLIP", unit="step")
    for _ in bar:
        chosen = draw.integers(len(scenes), size=options.batch_size).tolist()
        descriptions = [scenes.describe(i) for i in chosen]
        others = [str(contrary(each, draw)) for each in descriptions for _ in range(CONTRARY)]
        loss = model.loss(torch.stack([scenes[i][0] for i in chosen]), list(map(str, descriptions)), others)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {figure(loss.item())}", refresh=False)
    model.eval().requires_grad_(False)


@torch.inference_mode()
def agreement(model: SmallCLIP, scenes: Scenes, count: int) -> tuple[float, float]:
    """Shares of the first scenes whose own caption is nearest of all, and nearer than a contrary one."""
    draw = np.random.Generator(np.random.PCG64(0))
    captions = [scenes.caption(i) for i in range(count)]
    images = torch.cat([model.embed_images(torch.stack([scenes[i][0]])) for i in range(count)])
    own, wrong = (
        model.embed_texts(texts) for texts in (captions, [str(contrary(parse_caption(c), draw)) for c in captions])
    )
    nearest = (images @ own.T).argmax(1) == torch.arange(count)
    beats = (images * own).sum(1) > (images * wrong).sum(1)
    return nearest.float().mean().item(), beats.float().mean().item()


def _convolution(channels_in: int, channels_out: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size, stride=2, padding=kernel_size // 2),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )
