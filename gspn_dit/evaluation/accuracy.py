"""Top-1 and top-5 accuracy of a classifier, whose images any number of processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLUMNS = ("top1", "top5", "loss", "num_images")


@torch.no_grad()
def tally(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """How many images a classifier has right: float64 (4,) on the CPU.

    They are the sums over images of "the label is the likeliest class", "it is among the five likeliest" and the cross
    entropy, and the number of images. Processes' tallies add up.

    Args:
        model: In evaluation mode, on the device.
        batches: Images (B, C, H, W) and labels (B,).
        device: Where the model is.
        autocast: Makes the context in which it is called.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for images, labels in batches:
        with autocast():
            logits = model(images.to(device, non_blocking=True))
        sums += tally_of(logits.float(), labels.to(device)).cpu()
    return sums


def tally_of(logits: Tensor, labels: Tensor) -> Tensor:
    """That of one batch of logits (B, classes), on their device."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([best[:, 0].sum(), best.sum(), loss, loss.new_tensor(len(labels))]).double()


def scores(sums: Tensor) -> dict[str, float]:
    """`top1` and `top5` in percent, `loss` and `num_images`, of the sum of all tallies."""
    top1, top5, loss, count = sums.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "num_images": int(count)}
