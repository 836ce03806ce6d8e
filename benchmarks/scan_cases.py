"""Calls of the operator on a GPU by name: shapes, gates and scans, of random tensors laid out as the models' are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gspn_dit.ops import propagate

DEVICE = "cuda"
FOUR = ("down", "up", "right", "left")


@dataclass(frozen=True)
class Case:
    """One row: a shape, its gates and scans."""

    name: str
    batch: int
    side: int
    channels: int
    groups: int
    chunk: int | None
    window: int | None = None
    shift: int = 0
    directions: tuple[str, ...] = FOUR
    dtype: torch.dtype = torch.bfloat16
    sites_innermost: bool = False
    factors: bool = True  # f and s a channel and direction, as in gspn-dit
    trains: bool = True
    tail: bool = False  # whether the norm and the direct path of the mixer are the operator's

    @property
    def key(self) -> str:
        """The name of the row in the results' JSON."""
        return f"{self.name}, {self.scans}"

    @property
    def scans(self) -> str:
        """What the scans run over, in words."""
        if self.window:
            return f"window {self.window}{f' from {self.shift}' if self.shift else ''}"
        return f"chunk {self.chunk}" if self.chunk else "global"

    @property
    def floor_bytes(self) -> int:
        """x, gates and λ read once, y written once."""
        tokens = self.batch * self.side**2
        return self.dtype.itemsize * tokens * (2 * self.channels + 4 * len(self.directions) * self.groups)

    def operands(self) -> list[Tensor]:
        """What a training step differentiates with respect to, random, laid out as the models have it.

        x; with G < C one map (B, H, W, G, 4K) of a group's 3K gates and K λ side by side, else gates and λ, channels
        innermost; f and s, then d, if the case has them.
        """
        b, n, c, g, k = self.batch, self.side, self.channels, self.groups, len(self.directions)

        def make(fill: Callable[..., Tensor], *shape: int) -> Tensor:
            if not self.sites_innermost:
                return fill(shape, dtype=self.dtype, device=DEVICE)
            every_axis_outside = (b, *shape[3:], n, n)
            return fill(every_axis_outside, dtype=self.dtype, device=DEVICE).movedim((-2, -1), (1, 2))

        tensors = [make(torch.randn, b, n, n, c)]
        if g < c:
            tensors.append(make(torch.randn, b, n, n, g, 4 * k))
            tensors[-1][..., 3 * k :].uniform_()
        else:
            tensors += [make(torch.randn, b, n, n, k, 3, g), make(torch.rand, b, n, n, k, g)]
        if self.factors:
            tensors += [torch.rand(k, c, device=DEVICE), torch.randn(k, c, device=DEVICE)]
        return [*tensors, torch.randn(c, device=DEVICE)] if self.tail else tensors

    def arguments(self, operands: list[Tensor]) -> tuple[Tensor | None, ...]:
        """x, gates, λ, f, s and d; of a map of gates and λ they are views, as GSPNMixer makes them."""
        k, (x, *tensors) = len(self.directions), operands
        direct = tensors.pop() if self.tail else None
        decay, scale = (tensors.pop(-2), tensors.pop(-1)) if self.factors else (None, None)
        if self.groups < self.channels:
            gates, input_gate = tensors[0].split((3 * k, k), dim=-1)
            tensors = [gates.unflatten(-1, (k, 3)).permute(0, 1, 2, 4, 5, 3), input_gate.permute(0, 1, 2, 4, 3)]
        return x, *tensors, decay, scale, direct

    def run(self, operands: list[Tensor], backend: str) -> Tensor:
        """The operator on a set of operands."""
        *gated, decay, scale, direct = self.arguments(operands)
        options: dict[str, Any] = {"direct": direct} if self.tail else {}
        options |= {"window": self.window, "shift": self.shift} if self.window else {"chunk": self.chunk}
        return propagate(*gated, decay=decay, scale=scale, **options, directions=self.directions, backend=backend)

    def train(self, operands: list[Tensor], grad: Tensor, backend: str) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of a set of operands."""
        return torch.autograd.grad(self.run(operands, backend), operands, grad)


def cases() -> Iterator[Case]:
    """What a target is set for: DiT-XL's maps from 256 pixels to 16K and GSPN-2's configuration; then other gates."""
    maps = {256: 64, 512: 32, 1024: 8, 2048: 2}  # images by pixels
    for pixels, batch in maps.items():
        yield Case(f"{pixels} px", batch, pixels // 16, 1152, 18, None)
    for chunk in (32, None):
        yield Case("16K px", 1, 1024, 1152, 18, chunk, trains=False)
    yield Case(
        "GSPN-2: 1024², 8 ch",
        16,
        1024,
        8,
        8,
        None,
        directions=("down",),
        dtype=torch.float32,
        sites_innermost=True,
        factors=False,
    )
    options = inspect.signature(propagate).parameters  # of the code that is measured, which may be older
    if "direct" in options:
        for pixels in (256, 512, 1024):
            yield Case(f"{pixels} px, norm and direct path", maps[pixels], pixels // 16, 1152, 18, None, tail=True)
    for pixels in (1024, 2048):  # larger than the windows that the models' local layers have
        yield Case(f"{pixels} px", maps[pixels], pixels // 16, 1152, 18, 32)
        if "window" in options:  # in the layers whose grid is shifted
            yield Case(f"{pixels} px", maps[pixels], pixels // 16, 1152, 18, None, window=32, shift=16)
    yield Case("256 px, without f and s", 64, 16, 1152, 18, None, factors=False)
    yield Case("256 px, 16 channels a group", 64, 16, 1152, 72, None)
    yield Case("256 px, a gate a channel", 64, 16, 1152, 1152, 2, factors=False)
    for pixels, batch in maps.items():
        yield Case(f"{pixels} px", batch, pixels // 16, 1152, 18, 2)
