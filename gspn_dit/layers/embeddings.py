"""Embeddings: patches, times, class labels and (for DiT) positions as vectors of the model's width."""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from gspn_dit.errors import InputError, not_none


class PatchEmbedding(nn.Module):
    """Every p × p patch of the latents as one token: a convolution whose stride is its kernel (DiT, section 3.2).

    (B, C_in, h, w) to (B, h/p, w/p, C), contiguous with channels last.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(not_none(self.proj.bias))

    def forward(self, latents: Tensor) -> Tensor:
        # Turning the few latent channels here lets the convolution write its many channels last, without a copy.
        latents = latents.contiguous(memory_format=torch.channels_last)
        return self.proj(latents).permute(0, 2, 3, 1).contiguous()


TIME_EMBEDDINGS = ("dit", "sit", "diffusers")


class TimestepEmbedding(nn.Module):
    """Cosines and sines of a time at 128 frequencies from 1 down, then an MLP.

    (B,) on the scale 0 to 1000, where 1000 is noise, whole or not, to (B, C).

    Args:
        width: Channels C.
        convention: Whose time and frequencies these are. Of timestep n, `dit` takes n, at frequencies 10000^(-i/128).
            `sit` takes 1 - n/1000, the time that SiT's own code tells its networks, at the same frequencies.
            `diffusers` takes n at 10000^(-i/127), as DiTTransformer2DModel does.

    Raises:
        InputError: Another convention.
    """

    frequency_embedding_size = 256

    def __init__(self, width: int, convention: str = "dit") -> None:
        super().__init__()
        if convention not in TIME_EMBEDDINGS:
            raise InputError(argument="time_embedding", value=convention, wanted=f"one of {', '.join(TIME_EMBEDDINGS)}")
        self.convention = convention
        first, last = nn.Linear(self.frequency_embedding_size, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, timesteps: Tensor) -> Tensor:
        times = timesteps.float()
        if self.convention == "sit":
            times = 1 - times / 1000
        waves = get_timestep_embedding(
            times,
            self.frequency_embedding_size,
            flip_sin_to_cos=True,
            downscale_freq_shift=1 if self.convention == "diffusers" else 0,
        )
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """One learned vector per class and one more, the last, for "no class": (B,) long to (B, C).

    Raises:
        InputError: At the call, labels that are not ids, and on the CPU one that is no class. On a GPU, where reading
            the labels would wait for all queued work, an assertion in the lookup fails instead.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, class_labels: Tensor) -> Tensor:
        if class_labels.dtype not in (torch.int64, torch.int32):
            raise InputError(f"dtype {class_labels.dtype}", argument="class_labels", wanted="class ids, torch.long")
        if class_labels.device.type == "cpu" and type(class_labels) is Tensor and not torch.compiler.is_compiling():
            wrong = class_labels[(class_labels < 0) | (class_labels > self.num_classes)]
            if len(wrong):
                raise InputError(
                    f"{int(wrong[0])} is among them",
                    argument="class_labels",
                    remedy=f"give 0 to {self.num_classes - 1}, or {self.num_classes} for no class",
                )
        return self.embedding_table(class_labels)


def sincos_positions(
    height: int,
    width: int,
    channels: int,
    device: torch.device | None = None,
    over: tuple[int, int] | None = None,
) -> Tensor:
    """DiT's fixed position table for a map of any size, (1, height, width, channels), float32.

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row, at channels / 4
    frequencies from 1 down to nearly 1/10000 ("Attention Is All You Need", section 3.5, once for each axis).

    Args:
        height: Rows of the map.
        width: Its columns.
        channels: A multiple of 4.
        device: Where the table is made.
        over: (rows, columns) of another map, over whose positions this one's are spread evenly: row r is at
            r · rows / height. None is whole numbers.
    """
    frequencies = torch.exp(torch.arange(channels // 4, device=device) * (-math.log(10_000) / (channels // 4)))
    rows, columns = over or (height, width)
    column = torch.arange(width, device=device)[:, None] * (columns / width) * frequencies  # (W, C/4)
    row = torch.arange(height, device=device)[:, None] * (rows / height) * frequencies  # (H, C/4)
    column, row = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in (column, row))
    table = torch.cat([column.expand(height, -1, -1), row[:, None].expand(-1, width, -1)], dim=-1)
    return table[None]
