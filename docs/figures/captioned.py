"""Draw docs/figures/scenes.png and docs/figures/emoji.png: a few captioned pictures of each set.

Run `python docs/figures/captioned.py [FOLDER]` from the root of the repository.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gspn_dit.data.captions import open_captioned

SHOWN = {"scenes": (2, 6), "emoji": (3, 8)}  # rows and columns
LETTERS = 22  # in a line of a caption


def main(folder: Path) -> None:
    """Draw both figures from the training splits, pictures at even distances."""
    for source, (rows, columns) in SHOWN.items():
        images = open_captioned(source, 64)
        figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 2.2 * rows), layout="constrained")
        for k, axis in enumerate(axes.flat):
            index = k * (len(images) // axes.size)
            axis.imshow(images[index][0].permute(1, 2, 0), interpolation="nearest")
            axis.set_title(textwrap.fill(images.caption(index), LETTERS), fontsize=8, y=-0.05, va="top")
            axis.axis("off")
        figure.savefig(folder / f"{source}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
