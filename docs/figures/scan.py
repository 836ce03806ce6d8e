"""Draw docs/figures/scan.png: what one token's value becomes after one scan, and after four.

Run `python docs/figures/scan.py [OUT.png]` from the root of the repository. The responses are the operator's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import Tensor

from gspn_dit.ops import propagate

SIDE, CENTRE = 33, 16  # tokens
HALF_LIFE = 8  # lines, of the decay f
ALL = ("down", "up", "right", "left")


def response(directions: tuple[str, ...], side_logit: float = 0.0, half_life: float = 0.0, chunk: int | None = None):
    """The operator's output (SIDE, SIDE) for a map that is 1 at its centre token and 0 elsewhere.

    Args:
        directions: Which scans are summed.
        side_logit: Gate logit of both side neighbours; the centre neighbour's is 0, so 0 gives equal thirds.
        half_life: Lines after which decay leaves half; 0 is no decay.
        chunk: Lines per chunk.
    """
    k = len(directions)
    x = torch.zeros(1, SIDE, SIDE, 1)
    x[0, CENTRE, CENTRE] = 1
    gates = torch.tensor([side_logit, 0.0, side_logit]).view(3, 1).expand(1, SIDE, SIDE, k, 3, 1).contiguous()
    input_gate = torch.ones(1, SIDE, SIDE, k, 1)
    decay = torch.full((k, 1), 0.5 ** (1 / half_life)) if half_life else None
    y = propagate(x, gates, input_gate, decay=decay, chunk=chunk, directions=directions, backend="reference")
    return y[0, :, :, 0]


def sketch(axes: Axes) -> None:
    """Three lines of a "down" scan, and the four values that one new value is made of."""
    for line in range(3):
        for position in range(5):
            axes.plot(position, -line, "o", ms=13, mfc="white", mec="0.6")
    for position, weight in zip((1, 2, 3), ("$w^-$", "$w^0$", "$w^+$"), strict=True):
        axes.plot(position, -1, "o", ms=13, mfc="tab:blue", mec="tab:blue")
        axes.annotate("", (2, -2), (position, -1), arrowprops={"arrowstyle": "-|>", "shrinkA": 8, "shrinkB": 9})
        axes.text(position, -0.68, weight, fontsize=11, ha="center", va="center")
    axes.plot(2, -2, "o", ms=13, mfc="tab:orange", mec="tab:orange")
    axes.annotate("", (2.12, -2.1), (2.9, -2.75), arrowprops={"arrowstyle": "-|>", "shrinkB": 6})
    axes.text(2.95, -2.9, r"$\lambda x$", fontsize=12)
    for line, name in enumerate(("line $i-2$", "line $i-1$", "line $i$")):
        axes.text(-0.45, -line, name, ha="right", va="center", fontsize=9)
    axes.text(2, 0.5, "position $j$", ha="center", fontsize=9)
    axes.set(xlim=(-2.1, 4.4), ylim=(-3.2, 0.9), title='(a) one step of "down"')
    axes.axis("off")


def show(axes: Axes, values: Tensor, title: str, chunk: int | None = None) -> object:
    """One response; tokens that it does not reach are white, chunk borders are dashed."""
    reached = torch.where(values > 0, values, torch.nan)
    picture = axes.imshow(reached, cmap="viridis", norm=LogNorm(1e-3, 1))
    for border in range(chunk or SIDE, SIDE, chunk or SIDE):
        for draw in (axes.axhline, axes.axvline):
            draw(border - 0.5, color="tab:red", lw=0.8, ls="--")
    axes.set(xticks=[], yticks=[], title=title)
    return picture


def main(out: Path) -> None:
    """Draw the figure."""
    figure, rows = plt.subplots(2, 3, figsize=(9.6, 6.3), layout="constrained")
    axes = rows.ravel()
    sketch(axes[0])
    show(axes[1], response(("down",)), '(b) "down", equal weights')
    show(axes[2], response(("down",), -3.0), '(c) "down", 84% from the centre')
    show(axes[3], response(("down",), -3.0, HALF_LIFE), f"(d) as (c), half-life of {HALF_LIFE} lines")
    show(axes[4], response(ALL, half_life=HALF_LIFE), "(e) all four directions")
    picture = show(axes[5], response(ALL, half_life=HALF_LIFE, chunk=11), "(f) as (e), chunks of 11 lines", chunk=11)
    figure.colorbar(picture, ax=rows, shrink=0.6, label="response to a value of 1 at the centre token", extend="both")
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
