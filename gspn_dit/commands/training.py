"""Options of the commands beside a training; those of the training itself are in `gspn_dit.config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gspn_dit.options import require


@dataclass
class BudgetOptions:
    """Budget: models, batch and machine that are reckoned with.

    Args:
        names: Models, also classifiers.
        image_size: Side of the images in pixels, 8 times that of latents.
        batch_size: Images per step over all GPUs.
        gpus: Numbers of GPUs.
        memory_gb: Memory per GPU, in 10^9 bytes.
        peak_tflops: Dense bfloat16 peak per GPU, in 10^12 operations per second; 989 for an H100 SXM, 312 for an A100.
        utilisation: Share of the peak that training is assumed to reach.
        node_gpus: GPUs per machine.
        node_gb_s: Bandwidth per GPU to others of its machine, in 10^9 bytes per second; 450 for NVLink 4.
        network_gb_s: Bandwidth per GPU to other machines; 50 for a 400 Gb/s adapter per GPU.
        steps: Steps of the whole training.
    """

    names: list[str] = field(
        default_factory=lambda: ["dit-xl-2", "gspn-xl-2", "gspn-dit-xl-2", "gspn-dit-l-2", "gspn-dit-b-2"]
    )
    image_size: int = 256
    batch_size: int = 256
    gpus: list[int] = field(default_factory=lambda: [1, 8, 64])
    memory_gb: float = 80.0
    peak_tflops: float = 989.0
    utilisation: float = 0.4
    node_gpus: int = 8
    node_gb_s: float = 450.0
    network_gb_s: float = 50.0
    steps: int = 400_000

    def __post_init__(self) -> None:
        require(self.image_size >= 16 and self.image_size % 16 == 0, "image_size", self.image_size, "a multiple of 16")
        for number in self.gpus:
            require(number >= 1 and self.batch_size % number == 0, "gpus", number, f"a divisor of {self.batch_size}")
        for key in ("batch_size", "memory_gb", "peak_tflops", "node_gpus", "node_gb_s", "network_gb_s", "steps"):
            require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")
        require(0 < self.utilisation <= 1, "utilisation", self.utilisation, "a share up to 1")


@dataclass
class PosthocEMAOptions:
    """Average: the run, and the width of the average of its weights.

    Args:
        run: The run, trained with `training.posthoc_ema_every` above 0.
        sigma_rel: Width of the average relative to its step: 0.05 is sharp, 0.2 is wide.
        out: The folder to write, a model for `sample` and `export`; it must not exist yet.
        step: The average ends at this step; the newest snapshot's if not given.
    """

    run: str
    sigma_rel: float
    out: str
    step: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.sigma_rel <= 0.28, "sigma_rel", self.sigma_rel, "a number above 0, at most 0.28")
