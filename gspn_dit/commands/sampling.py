"""Options of the commands that turn a trained model into images or a saved pipeline."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gspn_dit.arguments import MixedPrecision, Switch, check_num_inference_steps
from gspn_dit.errors import not_none
from gspn_dit.guidance import Guidance, GuidanceSchedule
from gspn_dit.options import require
from gspn_dit.storage.files import is_stream
from gspn_dit.text.prompts import prompt_lines


class ImagesOut:
    """Where images go that a command draws: `out` is a folder, or one picture that is made of them."""

    out: str | None

    @property
    def single_files(self) -> bool:
        """Whether `out` is a folder."""
        if not self.out or is_stream(self.out):
            return False
        return self.out.endswith(("/", os.sep)) or not Path(self.out).suffix or Path(self.out).is_dir()

    @property
    def npz_file(self) -> str | None:
        """A further file that is made of them, if there is to be one."""
        return None

    @property
    def folder(self) -> Path:
        """Where the single images go: `out`, or a hidden folder beside the one file that is made of them."""
        if self.single_files:
            path = Path(not_none(self.out))
            return Path(os.path.realpath(path)) if path.is_symlink() else path
        path = Path(self.out or not_none(self.npz_file))
        if is_stream(path):  # there is no writing beside it
            return Path(tempfile.gettempdir()) / f".{path.name}.{os.getuid()}.images"
        return path.with_name(f".{path.name}.images")

    def check_out(self) -> None:
        """Raise :class:`InputError` if `out` is neither a folder nor a .png file."""
        if self.out is not None:
            fits = self.single_files or is_stream(self.out) or Path(self.out).suffix == ".png"
            require(fits, "out", self.out, f"a .png file or a folder, which a slash at its end makes it: {self.out}/")


@dataclass
class SampleOptions(ImagesOut):
    """Sampling: what to draw, from which model, and where to.

    Args:
        model: A run, a checkpoint folder, an exported folder, or a packaged model: `digits`, `photos`; or published
            weights of DiT or SiT: a `.pt` file, a folder of diffusers, or a hub name such as `facebook/DiT-XL-2-256`.
        vae: A folder or hub name of a VAE in place of the model's own, for example one that was moved, or whose decoder
            was trained further.
        class_labels: Class ids or names with commas between them (only names where the names are numbers); all
            classes if not given.
        prompts: Of a model of text, what to draw: a prompt, or a .txt file with one in each line; the run's own if not
            given.
        labels: `balanced` takes these classes or prompts in turn; `random` draws that of each image by the seed.
        num_images: How many images.
        guidance_scale: Classifier-free guidance, 1 for none; the model's own default if not given.
        guidance_interval: Range of noise levels at which guidance acts, from 0 (clean) to 1 (pure noise).
        guidance_schedule: How the guidance scale depends on the noise level.
        guidance_power: Exponent of `power-cosine`; 4 if not given.
        guidance_rescale: By how much a guided prediction is scaled to the standard deviation of the model's own, from
            0 to 1.
        apg_eta: Of adaptive projected guidance, the share left of the parallel part of an update; 1 is all.
        apg_norm_threshold: Its greatest norm of an update; 0 for none.
        apg_momentum: Its weight of the updates before, between -1 and 1; 0 for none.
        guide: A worse model of the same kind, for example a smaller one, or an earlier checkpoint: guidance leads away
            from its prediction of the same class or prompt (autoguidance). As `model`.
        num_inference_steps: Denoising steps; the model's own default if not given.
        sampler: `ddpm`, `ddim`, `dpm++` or `edm` for a ddpm model; `euler`, `heun`, `sde`, `dopri5` or `edm` for a flow
            model; or a scheduler of diffusers by its class, for example `UniPCMultistepScheduler`.
        scheduler_options: What of the sampler is other than by default, for example `use_karras_sigmas=true`.
        shift: Shift of a flow model's noise levels for another size than trained: above 1, more of the steps are
            noisy; `auto` takes √(pixels / trained pixels).
        chunk_scale: Length of the chunks or windows of local scans relative to training; `auto` takes
            √(pixels / trained pixels).
        mixed_precision: Number format of the transformer: `auto` is bf16 where the device has instructions for it and
            float32 elsewhere; `no` is float32; or `bf16`, or `fp16`.
        cuda_graph: Replay the transformer's forward as a CUDA graph: the same images, sooner with a small model; `auto`
            does so once enough steps have shown that it pays.
        seed: Image i depends on (seed, i) alone, not on the batch size or the number of processes.
        batch_size: Images per forward pass in each process; if not given, 16, or fewer where images are larger than
            trained.
        height: Pixels; the trained size if not given.
        width: Pixels; the trained size if not given.
        out: A `.png` file for one grid, or a folder for single PNGs and labels.csv; `samples.png` unless `npz` is
            given.
        npz: An npz file in ADM's format: images `arr_0`, uint8 (N, H, W, 3), and labels `arr_1`; without a name, it is
            called as the folder `out`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    """

    model: str = "digits"
    vae: str | None = None
    class_labels: str | None = None
    prompts: str | None = None
    labels: Literal["balanced", "random"] = "balanced"
    num_images: int = 16
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_schedule: GuidanceSchedule | None = None
    guidance_power: float | None = None
    guidance_rescale: float | None = None
    apg_eta: float | None = None
    apg_norm_threshold: float | None = None
    apg_momentum: float | None = None
    guide: str | None = None
    num_inference_steps: int | None = None
    sampler: str | None = None
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    shift: float | Literal["auto"] | None = None
    chunk_scale: float | Literal["auto"] | None = None
    mixed_precision: MixedPrecision = "auto"
    cuda_graph: Switch = "auto"
    seed: int = 0
    batch_size: int | None = None
    height: int | None = None
    width: int | None = None
    out: str | None = None
    npz: bool | str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.num_images >= 1, "num_images", self.num_images, "1 or more")
        if self.batch_size is not None:
            require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.num_inference_steps is not None:
            check_num_inference_steps(self.num_inference_steps)
        Guidance(**{name: value for name, value in self.guidance.items() if value is not None})
        if self.class_labels and re.fullmatch(r"\[.*\]", self.class_labels):  # as any list may be written
            self.class_labels = self.class_labels[1:-1]
        if self.prompts is not None:
            require(self.class_labels is None, "class_labels", self.class_labels, "either these or prompts")
            require(bool(self.prompt_list), "prompts", self.prompts, "a prompt, or a .txt file that holds some")
        self.npz = self.npz or None
        if self.out is None and self.npz is None:
            self.out = "samples.png"
        self.check_out()
        if self.npz is True:
            require(self.single_files, "npz", True, "a file name, or --out with a folder that gives it its name")
            self.npz = f"{Path(not_none(self.out))}.npz"
        if self.npz is not None:
            require(Path(self.npz).suffix == ".npz", "npz", self.npz, "a file name ending in .npz")

    @property
    def guidance(self) -> dict[str, Any]:
        """The options of guidance by their names; None is the model's own default."""
        return {each.name: getattr(self, each.name) for each in fields(Guidance)}

    @cached_property
    def prompt_list(self) -> list[str]:
        """The prompts that are given, or those of their file. Raises :class:`InputError`."""
        if self.prompts is None or not self.prompts.endswith(".txt"):
            return [self.prompts] if self.prompts else []
        return prompt_lines(self.prompts)

    @property
    def npz_file(self) -> str | None:
        """The npz to write, which is `npz` with a name; None if there is to be none."""
        return self.npz if isinstance(self.npz, str) else None


@dataclass
class ExportOptions:
    """Export: a trained model, and the folder it is saved to.

    Args:
        model: A run, or one checkpoint of it; or published weights of DiT or SiT, as `sample` takes them.
        out: The folder to write; it must not exist yet.
        vae: A folder or hub name of a VAE in place of the run's own, for example one that was moved, or whose decoder
            was trained further.
        convention: Whose a `.pt` file is that does not say it: `dit` predicts noise and variance, `sit` a velocity.
    """

    model: str
    out: str
    vae: str | None = None
    convention: Literal["dit", "sit"] | None = None
