"""Draw docs/figures/clothes.png: what the packaged classifier takes the first test picture of each class for.

Run `python docs/figures/clothes.py [OUT.png]` from the root of the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from gspn_dit.inference.image_classifier import ImageClassifier

PICTURES = Path(__file__).with_name("fashion-test.png")
SIDE, TOP = 28, 3


def pictures() -> list[Image.Image]:
    """The test pictures in fashion-test.png: ten of each class, one class after the other."""
    with Image.open(PICTURES) as sheet:
        corners = [(x, y) for y in range(0, sheet.height, SIDE) for x in range(0, sheet.width, SIDE)]
        return [sheet.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def main(out: Path) -> None:
    """Draw the figure."""
    classifier, shown = ImageClassifier.load("fashion"), pictures()[::10]
    figure, axes = plt.subplots(4, 5, figsize=(11, 6), height_ratios=(2, 1) * 2, layout="constrained")
    pairs = [(above, below) for row in (0, 2) for above, below in zip(axes[row], axes[row + 1], strict=True)]
    for (above, below), picture, own, chances in zip(
        pairs, shown, classifier.class_names, classifier(shown), strict=True
    ):
        above.imshow(picture, cmap="gray", interpolation="nearest")
        above.set_title(own, fontsize=10)
        above.axis("off")
        best = chances.topk(TOP)
        names = [classifier.class_names[int(i)] for i in best.indices]
        below.barh(names, best.values.tolist(), color=["tab:green" if name == own else "tab:gray" for name in names])
        for place, chance in enumerate(best.values.tolist()):
            below.text(chance + 0.02, place, f"{chance:.0%}", va="center", fontsize=8)
        below.set(xlim=(0, 1.25), xticks=[])
        below.invert_yaxis()
        below.tick_params(labelsize=8)
        below.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
