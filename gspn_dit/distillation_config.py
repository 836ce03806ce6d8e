"""The typed configuration of a distillation: self-attention of a Stable Diffusion UNet replaced and taught."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gspn_dit.arguments import Switch, default_workers
from gspn_dit.config import LoopConfig, RunConfig
from gspn_dit.data.sources import SOURCES
from gspn_dit.options import require
from gspn_dit.storage.packaged import PACKAGED_TEXT_TO_IMAGE, absolute


@dataclass
class ReplacementConfig:
    """Replacement: what takes the place of which self-attention layers.

    Args:
        mixer: `gspn`, line scans from the layers' own Q, K and V; `fresh`, new line scans that keep nothing of the
            attention, at half the cost; `linear`, linear attention; `window`, attention within a window.
        layers: Which self-attention is replaced: `all`; `levels=0,1` for those of these levels, where 0 has the size
            of the latents and each next one half of it; names such as `mid_block`; or a list of those.
        keep_attention: Which of them keep their attention, as `layers`.
        chunk: Lines that a scan runs over, or the side of a window, in tokens; null for the whole map.
        windows: `shifted` for windows of chunk × chunk tokens that lie elsewhere in every second layer; `aligned` for
            windows that do not; null for chunks of lines.
        global_layers: Which layers take the whole map whatever the chunk, as `layers`; `[]` for none.
        init_from: A run, a checkpoint or a saved replacement whose weights a new run begins with, as stage 2 does with
            stage 1's; if not given, they are made of the attention that is replaced.
    """

    mixer: Literal["gspn", "fresh", "linear", "window"] = "gspn"
    layers: list[str] | str = "all"
    keep_attention: list[str] | str = field(default_factory=list)
    chunk: int | None = 32
    windows: Literal["shifted", "aligned"] | None = "shifted"
    global_layers: list[str] | str = "mid_block"
    init_from: str | None = None

    def __post_init__(self) -> None:
        for key in ("layers", "keep_attention", "global_layers"):
            value = getattr(self, key)
            setattr(self, key, [value] if isinstance(value, str) else value)  # the same however it was written
        require(bool(self.layers), "replacement.layers", self.layers, "all, levels=0,1 or names")
        require(self.chunk is None or self.chunk >= 1, "replacement.chunk", self.chunk, "1 or more, or null")
        if self.init_from is not None:
            self.init_from = absolute(self.init_from)


@dataclass
class DistillationDataConfig:
    """Data: pictures with captions, or a store of latents and text embeddings.

    Args:
        source: A store made by `gspn-dit encode-t2i`; a named source with captions (`scenes`); or a folder of pictures
            with `.txt` beside them or a jsonl of `file_name` and `text`.
        image_size: Side of the square pictures in pixels.
        num_workers: Processes that read data, per training process; 0 reads in the training process itself. If not
            given, one for each core, up to 4.
    """

    source: str = "data/captioned"
    image_size: int = 512
    num_workers: int = field(default_factory=default_workers)

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "data.image_size", self.image_size, "a positive number of pixels")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        self.source = absolute(self.source, SOURCES)


@dataclass
class LossConfig:
    """Distillation: which of its two stages, and what the loss of the second is the sum of.

    Args:
        stage: `layerwise`: every layer alone, on the inputs that the teacher's has, by its squared error over the
            variance of the teacher's output; `end-to-end`: the UNet with all layers replaced.
        noise_weight: For `end-to-end`: weight of the error against the noise (or velocity) that is in the latents.
        teacher_weight: For `end-to-end`: weight of the error against what the teacher predicts.
        feature_weight: For `end-to-end`: weight of the mean error of the attention layers' outputs.
        caption_dropout: Share of captions that are replaced by none, for classifier-free guidance.
    """

    stage: Literal["layerwise", "end-to-end"] = "end-to-end"
    noise_weight: float = 1.0
    teacher_weight: float = 0.5
    feature_weight: float = 0.5
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        weights = ("noise_weight", "teacher_weight", "feature_weight")
        for key in weights:
            require(getattr(self, key) >= 0, f"distillation.{key}", getattr(self, key), "0 or more")
        some = any(getattr(self, key) for key in weights)
        require(some, "distillation.noise_weight", 0, "some weight above 0, of the three")
        share = self.caption_dropout
        require(0 <= share <= 1, "distillation.caption_dropout", share, "a share from 0 to 1")


@dataclass
class DistillationTrainingConfig(LoopConfig):
    """Training: steps, optimiser, averages, and what is written when.

    Args:
        compile: Only `false`: layers are changed for one another at each step, which no compiled block follows.
        cuda_graph: Only `false`, as `compile`.
    """

    max_steps: int = 10_000
    batch_size: int = 96
    compile: Switch = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_steps >= 1, "training.max_steps", self.max_steps, "1 or more")
        for key in ("compile", "cuda_graph"):
            value = getattr(self, key)
            require(value is False, f"training.{key}", value, "false: layers change places at each step")


@dataclass
class DistillationConfig(RunConfig):
    """Run: everything that `distill-t2i` needs, written beside its checkpoints as config.yaml.

    Args:
        base: The teacher: the folder or hub name of a pipeline of Stable Diffusion 1.x, 2.x or SD-XL.
        replacement: What takes the place of which layers.
        data: Pictures with captions, or a store of latents and text embeddings.
        distillation: The stage and its loss.
        training: Steps, optimiser, averages, and what is written when.
    """

    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    replacement: ReplacementConfig = field(default_factory=ReplacementConfig)
    data: DistillationDataConfig = field(default_factory=DistillationDataConfig)
    distillation: LossConfig = field(default_factory=LossConfig)
    training: DistillationTrainingConfig = field(default_factory=DistillationTrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.base != "", "base", "", "a folder or a hub name")
        self.base = absolute(self.base, PACKAGED_TEXT_TO_IMAGE)
