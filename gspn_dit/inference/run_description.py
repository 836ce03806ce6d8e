"""What sampling needs to know of how a run was trained, read from its config.yaml; the trainer is not asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from gspn_dit.arguments import check_num_inference_steps
from gspn_dit.errors import InputError, is_finite, renamed
from gspn_dit.guidance import Guidance
from gspn_dit.text.tokens import MAX_LENGTH

_GUIDANCE = {
    name: value for name, value in vars(Guidance()).items() if name not in ("guidance_scale", "guidance_interval")
}
_OPTIONS: dict[str, tuple[str, str | list[str]]] = {
    "objective": ("diffusion", "objective"),
    "class_dropout": ("diffusion", "class_dropout"),
    "vae": ("data", "vae"),
    "sampler": ("sampling", "sampler"),
    "num_inference_steps": ("sampling", "num_inference_steps"),
    "guidance_scale": ("sampling", "guidance_scale"),
    "guidance_interval": ("sampling", "guidance_interval"),
    "guidance_options": ("sampling", list(_GUIDANCE)),
    "scheduler_options": ("sampling", "scheduler_options"),
    "tokenizer": ("text", "tokenizer"),
    "text_encoder": ("text", "encoder"),
    "max_tokens": ("text", "max_tokens"),
    "prompts": ("sampling", "prompts"),
}  # where config.yaml has each attribute; of several options, a dictionary of those that there are


@dataclass(frozen=True)
class RunDescription:
    """The few values of a run's configuration that sampling depends on.

    A default stands for an option that the run's version of the trainer did not have yet.

    Args:
        objective: `ddpm` or `flow`.
        class_dropout: Share of labels that training replaced by the null class.
        vae: Name or folder of the VAE.
        sampler: As :func:`~gspn_dit.diffusion.schedulers.create_scheduler` takes it.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_interval: Share (low, high) of the noise levels at which guidance acts.
        guidance_options: The further options of guidance, by their names.
        scheduler_options: What of the sampler is other than by default.
        tokenizer: Of a model of text: see :func:`~gspn_dit.text.parts.load_text_parts`, as for the next two.
        text_encoder: See there.
        max_tokens: See there.
        prompts: Of a model of text, what its grids show.

    Raises :class:`InputError` for a value that cannot be.
    """

    objective: str = "ddpm"
    class_dropout: float = 0.1
    vae: str = "stabilityai/sd-vae-ft-ema"
    sampler: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_options: dict[str, Any] = field(default_factory=lambda: dict(_GUIDANCE))
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    text_encoder: str | None = None
    max_tokens: int = MAX_LENGTH
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_num_inference_steps(self.num_inference_steps, "sampling.")
        with renamed("sampling."):
            Guidance(self.guidance_scale, self.guidance_interval, **self.guidance_options)
        if not isinstance(self.scheduler_options, Mapping):
            raise InputError(argument="sampling.scheduler_options", value=self.scheduler_options, wanted="options")
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        if not is_finite(self.class_dropout) or not 0 <= self.class_dropout <= 1:
            raise InputError(argument="diffusion.class_dropout", value=self.class_dropout, wanted="a share from 0 to 1")
        if not isinstance(self.vae, str):
            raise InputError(argument="data.vae", value=self.vae, wanted="a name or a folder")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RunDescription:
        """That of a run's configuration, nested as in config.yaml."""
        sections = {name: config.get(name) or {} for name, _ in _OPTIONS.values()}
        if odd := next((name for name, section in sections.items() if not isinstance(section, Mapping)), None):
            raise InputError(argument=odd, value=sections[odd], wanted="a section of options")
        found: dict[str, Any] = {}
        for name, (at, key) in _OPTIONS.items():
            if isinstance(key, list):
                found[name] = _GUIDANCE | {each: sections[at][each] for each in key if each in sections[at]}
            elif key in sections[at]:
                found[name] = sections[at][key]
        return cls(**found)

    @classmethod
    def read(cls, path: str | os.PathLike) -> RunDescription:
        """That of the run whose config.yaml is at `path`. Raises :class:`InputError` or OSError."""
        try:
            return cls.of(read_config(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """A run's configuration as config.yaml has it. Raises :class:`InputError` if that is no such file, or OSError."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"is damaged ({' '.join(str(error).split())})", remedy="restore it") from error
    if not isinstance(config, dict):
        raise InputError(f"holds {type(config).__name__}", wanted="a run's options")
    return config
