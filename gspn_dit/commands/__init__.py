"""Every command of `gspn-dit`: its options, and where its work is done.

The work is named, not imported: torch and diffusers take seconds, which a wrong option or `--help` must not cost. The
options of `gspn-dit train` are those of `gspn_dit.config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gspn_dit.classifier_config import ClassifierConfig
from gspn_dit.commands.classification import ClassifyOptions, EvaluateClassifierOptions
from gspn_dit.commands.data import EncodeOptions
from gspn_dit.commands.demo import ClassifierOptions, SmallCLIPOptions, SmallVAEOptions
from gspn_dit.commands.evaluation import EvaluateOptions, ReferenceOptions
from gspn_dit.commands.listings import ModelsOptions, OpsOptions
from gspn_dit.commands.sampling import ExportOptions, SampleOptions
from gspn_dit.commands.text_to_image import (
    COCOPromptsOptions,
    EncodeTextToImageOptions,
    EvaluateTextToImageOptions,
    GenerateOptions,
)
from gspn_dit.commands.training import BudgetOptions, PosthocEMAOptions
from gspn_dit.config import Config
from gspn_dit.distillation_config import DistillationConfig
from gspn_dit.errors import InputError
from gspn_dit.extras import require_extras
from gspn_dit.options import command, fail
from gspn_dit.text_to_image_config import TextToImageConfig

__all__ = [
    "GROUPS",
    "VERBS",
    "BudgetOptions",
    "COCOPromptsOptions",
    "ClassifierOptions",
    "ClassifyOptions",
    "EncodeOptions",
    "EncodeTextToImageOptions",
    "EvaluateClassifierOptions",
    "EvaluateOptions",
    "EvaluateTextToImageOptions",
    "ExportOptions",
    "GenerateOptions",
    "ModelsOptions",
    "OpsOptions",
    "PosthocEMAOptions",
    "ReferenceOptions",
    "SampleOptions",
    "SmallCLIPOptions",
    "SmallVAEOptions",
    "Verb",
    "run",
]


@dataclass(frozen=True)
class Verb:
    """A command.

    Args:
        main: The function that does its work, as "module:function".
        options: The dataclass that it takes.
        help: What it does, in one line.
        positional: The options that bare words are, in their order.
        continues: Whether the same command, given again, continues where it was.
        extras: What must be installed beside the core.
    """

    main: str
    options: type
    help: str
    positional: tuple[str, ...] = ()
    continues: bool = False
    extras: tuple[str, ...] = ("train",)


# In the order in which a user meets them.
GROUPS = {
    "Before a training": {
        "ops": Verb(
            "gspn_dit.ops.__main__:main",
            OpsOptions,
            "Say which kernels of the operator run here, or why not.",
            extras=("cli",),
        ),
        "models": Verb(
            "gspn_dit.models.__main__:main",
            ModelsOptions,
            "List models: parameters and GMACs.",
            extras=("cli",),
        ),
        "budget": Verb(
            "gspn_dit.training.budget:main",
            BudgetOptions,
            "Estimate a training: memory, steps per second, hours.",
            extras=("cli",),
        ),
        "encode": Verb(
            "gspn_dit.data.encode:main",
            EncodeOptions,
            "Encode images into a latent store, or verify one.",
            continues=True,
        ),
    },
    "Training": {
        "train": Verb("gspn_dit.training.loop:main", Config, "Train a latent diffusion transformer."),
        "train-classifier": Verb(
            "gspn_dit.training.loop:main", ClassifierConfig, "Train an image classifier.", extras=("train", "timm")
        ),
        "posthoc-ema": Verb(
            "gspn_dit.training.posthoc_ema:main",
            PosthocEMAOptions,
            "Average a run's weights anew, over any width, from its snapshots.",
        ),
    },
    "Classification": {
        "classify": Verb(
            "gspn_dit.inference.classify:main",
            ClassifyOptions,
            "Say what pictures show, with probabilities.",
            positional=("pictures",),
            extras=("cli",),
        ),
        "evaluate-classifier": Verb(
            "gspn_dit.inference.evaluate_classifier:main",
            EvaluateClassifierOptions,
            "Score a classifier on labelled images: top-1 and top-5 accuracy.",
            positional=("model",),
        ),
    },
    "Text to image": {
        "encode-t2i": Verb(
            "gspn_dit.data.encode_t2i:main",
            EncodeTextToImageOptions,
            "Encode captioned pictures, or draw prompts, into a latent store.",
            continues=True,
            extras=("train", "t2i"),
        ),
        "train-t2i": Verb(
            "gspn_dit.training.loop:main",
            TextToImageConfig,
            "Train a text-to-image model of Stable Diffusion's architecture.",
            extras=("train", "t2i"),
        ),
        "distill-t2i": Verb(
            "gspn_dit.training.loop:main",
            DistillationConfig,
            "Teach layers in the place of a pipeline's self-attention.",
            extras=("train", "t2i"),
        ),
        "generate": Verb(
            "gspn_dit.inference.generate:main",
            GenerateOptions,
            "Draw images of texts, of any size, by a Stable Diffusion pipeline.",
            positional=("prompt",),
            continues=True,
            extras=("train", "t2i"),
        ),
        "coco-prompts": Verb(
            "gspn_dit.data.coco:main",
            COCOPromptsOptions,
            "Draw prompts from COCO's captions, one of each picture.",
            positional=("captions", "out"),
            extras=("cli",),
        ),
        "evaluate-t2i": Verb(
            "gspn_dit.evaluation.text_to_image:main",
            EvaluateTextToImageOptions,
            "Score images of texts: FID, CLIP score, caption accuracy.",
            extras=("eval", "t2i"),
        ),
    },
    "Sampling": {
        "sample": Verb(
            "gspn_dit.inference.sample:main", SampleOptions, "Draw images from a trained model.", continues=True
        ),
        "export": Verb(
            "gspn_dit.inference.export:main",
            ExportOptions,
            "Save a run, or published weights of DiT or SiT, as a diffusers pipeline.",
            positional=("model", "out"),
        ),
    },
    "Evaluation": {
        "reference": Verb(
            "gspn_dit.evaluation.reference:main",
            ReferenceOptions,
            "Make a reference file: feature statistics of a data set, and some of its images.",
            extras=("eval",),
        ),
        "evaluate": Verb(
            "gspn_dit.evaluation.evaluate:main",
            EvaluateOptions,
            "Score images: FID, sFID, Inception Score, precision, recall, class accuracy.",
            extras=("eval",),
        ),
    },
    "Small models for trying things out": {
        "small-vae": Verb(
            "gspn_dit.demo.small_vae:main", SmallVAEOptions, "Train a small VAE of digits, photos or a folder."
        ),
        "small-clip": Verb(
            "gspn_dit.demo.small_clip:main",
            SmallCLIPOptions,
            "Train the small text encoder of scenes, by contrast with pictures.",
            extras=("train", "t2i", "demo"),
        ),
        "classifier": Verb(
            "gspn_dit.demo.classifier:main",
            ClassifierOptions,
            "Train the classifier that judges samples of digits or photos.",
        ),
    },
}
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}


def run(name: str, *, prog: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a command by its name; `prog` is what it was called as."""
    verb, prog = VERBS[name], prog or f"gspn-dit {name}"
    try:
        require_extras(*verb.extras)
    except InputError as error:
        fail(error, prog)
    command(
        verb.main,
        verb.options,
        prog=prog,
        argv=argv,
        description=verb.help,
        positional=verb.positional,
        continues=verb.continues,
    )
