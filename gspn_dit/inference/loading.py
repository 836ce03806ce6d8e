"""A name to a pipeline: of a run, one of its checkpoints, an exported folder, a packaged model or published weights.

A run's folder holds checkpoints (:mod:`gspn_dit.storage.run_folder`), of which the newest is taken: its averaged
weights, with the run's VAE, sampler, guidance and steps. An exported folder is what `save_pretrained` wrote, with
model_index.json; a packaged model is one that comes with this package. :mod:`gspn_dit.inference.published` has what
others have published. An exported folder and published weights may also lie on the hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, ModelMixin
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from gspn_dit.autoencoder import load_vae
from gspn_dit.autoencoder.vae import (
    NOT_HEEDED,
    adopt_normalisation,
    is_on_hub,
    normalisation,
    vae_record,
    vae_sha256,
)
from gspn_dit.diffusion import create_scheduler
from gspn_dit.errors import InputError, machine_fault, not_none, warn
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.published import (
    INDEX,
    check_index,
    class_names,
    is_dit_pipeline,
    is_published,
    is_weights,
    pipeline_of_weights,
    read_index,
)
from gspn_dit.inference.run_description import RunDescription
from gspn_dit.models.dit import DiT
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.published import SUFFIXES, is_diffusers_folder
from gspn_dit.models.registry import find_class
from gspn_dit.storage.packaged import PACKAGED_MODELS
from gspn_dit.storage.run_folder import Checkpoint, RunFolder
from gspn_dit.text.parts import load_text_parts


def load_pipeline(path: str | os.PathLike, vae: str | None = None, convention: str | None = None) -> GSPNDiTPipeline:
    """The pipeline of a run (its newest checkpoint), of one checkpoint, of an exported folder, `digits` or `photos`.

    A run's or checkpoint's comes with the averaged weights, and with the run's sampler, guidance and steps as defaults.
    Of published weights of DiT or SiT it is that of :mod:`gspn_dit.inference.published`.

    Args:
        path: The folder or file, a packaged model's name, or a hub name: OWNER/NAME, or OWNER/NAME/FILE of weights.
        vae: Folder or hub name of a VAE in place of the model's own. A warning says where its weights are others.
        convention: Of a file of weights that does not say whose it is, `dit` or `sit`.

    Raises :class:`InputError` if there is none of these, or its files cannot be read.
    """
    folder = _place(path)
    given = None if vae is None else load_vae(vae)
    if convention is not None and not folder.is_file():
        raise InputError("only a file of weights leaves it open", argument="convention", value=convention)
    with _reading(path):
        if is_weights(folder):
            return pipeline_of_weights(folder, vae=given, convention=convention, called=path)
        if _is_exported(folder):
            return _load_exported(folder, given, vae, str(path))
        return _load_checkpoint(_newest_checkpoint(folder), given, vae)


def load_transformer(path: str | os.PathLike) -> LatentModel:
    """The network alone of what :func:`load_pipeline` takes, which needs no VAE. Raises as that does."""
    folder = _place(path)
    with _reading(path):
        if is_weights(folder):
            return DiT.from_pretrained(folder, called=path)
        if _is_exported(folder):
            read_index(folder)
            return _load_transformer(folder / "transformer", path)
        return _load_transformer(_newest_checkpoint(folder).ema, path)


def load_class_names(path: str | os.PathLike) -> list[str] | None:
    """The names of its classes alone, if they have any. Raises as :func:`load_pipeline` does."""
    folder = _place(path)
    with _reading(path):
        if is_weights(folder):
            return None
        if _is_exported(folder):
            return class_names(read_index(folder))
        return _class_names(_newest_checkpoint(folder))


def is_of_others(path: str | os.PathLike) -> bool:
    """Whether what :func:`load_pipeline` takes is of another project's format. Raises as that does."""
    place = _place(path)
    with _reading(path):
        return is_published(place)


def find_checkpoint(path: str | os.PathLike) -> Checkpoint | None:
    """The checkpoint that :func:`load_pipeline` would take of a run or a checkpoint now; None for anything else.

    A run in training goes on writing checkpoints: who loads twice finds it once. Raises :class:`InputError`.
    """
    folder = _place(path)
    if _is_exported(folder) or is_weights(folder):
        return None
    try:
        return Checkpoint(_newest_checkpoint(folder).path.resolve())
    except InputError as error:
        raise InputError(str(error), argument="model", value=str(path)) from error


def pipeline_of(run: RunDescription, transformer: ModelMixin, vae: AutoencoderKL, **parts: Any) -> GSPNDiTPipeline:
    """The pipeline of a run's model, with the run's sampler, guidance and steps as defaults.

    Args:
        run: What is known of the run.
        transformer: The model.
        vae: Of its latents.
        parts: What else its kind of condition needs: `class_names`; or a `tokenizer`, and a `text_encoder` or None.
    """
    return GSPNDiTPipeline(
        transformer,
        vae,
        create_scheduler(run.objective, run.sampler, run.scheduler_options),
        guidance_scale=run.guidance_scale,
        guidance_interval=list(run.guidance_interval),
        guidance_options=dict(run.guidance_options),
        num_inference_steps=run.num_inference_steps,
        class_dropout=run.class_dropout,
        prompts=list(run.prompts) if "tokenizer" in parts else None,
        **parts,
    )


def _place(path: str | os.PathLike) -> Path:
    """Where it lies on this machine, a packaged model and what is on the hub, too. Raises :class:`InputError`."""
    place = PACKAGED_MODELS.get(str(path), Path(path))
    if place.exists():
        return place
    name, file = str(path), INDEX
    if Path(name).suffix in SUFFIXES and (parts := re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+)", name)):
        name, file = parts[1], parts[2]
    packaged = " or ".join(PACKAGED_MODELS)
    remedy = f"give a run, a checkpoint, an exported folder, weights of DiT or SiT, {packaged}, or a hub name of these"
    here_alone = not is_on_hub(name, remedy, file=file, argument="model")
    with _reading(path):
        if file != INDEX:
            return Path(hf_hub_download(name, file, local_files_only=here_alone))
        check_index(GSPNDiTPipeline.load_config(name, local_files_only=here_alone))  # before all of it is downloaded
        return Path(GSPNDiTPipeline.download(name, local_files_only=here_alone))


def _is_exported(folder: Path) -> bool:
    return (folder / INDEX).is_file()


@contextmanager
def _reading(path: str | os.PathLike) -> Iterator[None]:
    """In the block, files that cannot be read are an InputError of the model at `path`."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error), argument="model", value=str(path)) from error
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:  # damaged files
        if machine_fault(error) is not None:
            raise
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        raise InputError(
            f"its files cannot be read ({reason})", argument="model", value=str(path), remedy="make them again"
        ) from error


def _newest_checkpoint(folder: Path) -> Checkpoint:
    """The folder itself if it is a checkpoint, else the newest checkpoint of the run it is."""
    checkpoint, run = Checkpoint(folder), RunFolder(folder)
    if checkpoint.ema.is_dir():
        return checkpoint
    if not run.exists:
        raise InputError(
            f"not a run ({run.config.name}, {run.checkpoints.name}/), a checkpoint ({checkpoint.ema.name}/) or an "
            f"exported pipeline ({INDEX}), and no DiT of diffusers (config.json)"
        )
    if (newest := run.newest_checkpoint()) is None:
        raise InputError("the run has no checkpoint yet", remedy="it writes one every training.checkpoint_every steps")
    return newest


def _load_exported(folder: Path, given: AutoencoderKL | None, name: str | None, path: str) -> GSPNDiTPipeline:
    replaced: dict[str, Any] = {}
    if is_dit_pipeline(index := read_index(folder)):
        replaced["transformer"] = DiT.from_pretrained(folder, subfolder="transformer", called=path)
    if given is not None:
        own = load_vae(folder / "vae")
        replaced["vae"] = _fitted(given, not_none(name), vae_record(path, own.config, own))
    options = {} if is_dit_pipeline(index) else {"use_safetensors": True}  # diffusers' DiT was published before those
    pipe = GSPNDiTPipeline.from_pretrained(str(folder), local_files_only=True, **options, **replaced)
    if "class_dropout" not in index:  # of before, or of others
        adopt_normalisation(pipe.vae, normalisation(pipe.vae.config) | NOT_HEEDED, "this model")
    return pipe


def vae_of_run(
    checkpoint: Checkpoint, named: str, given: AutoencoderKL | None = None, name: str | None = None
) -> AutoencoderKL:
    """The VAE of a checkpoint's latents, which decodes as in its run.

    Args:
        checkpoint: Of the run.
        named: What the run's configuration calls its VAE.
        given: One to take in its place; a warning says where its weights are others.
        name: What that is called.

    Raises :class:`InputError` if it cannot be had.
    """
    record = checkpoint.read_metadata().get("vae") if checkpoint.metadata.is_file() else None
    if given is None:
        name = named
        try:
            given = load_vae(name)
        except InputError as error:
            raise InputError(
                f"the run's {error}", remedy="where it lies elsewhere now, name that with --vae"
            ) from error
    if record is None:  # a run of before
        record = vae_record(not_none(name), given.config, None) | NOT_HEEDED
    return _fitted(given, not_none(name), record)


def _load_checkpoint(checkpoint: Checkpoint, given: AutoencoderKL | None, name: str | None) -> GSPNDiTPipeline:
    run = RunDescription.read(checkpoint.config)
    transformer = _load_transformer(checkpoint.ema, checkpoint.ema)
    vae = vae_of_run(checkpoint, run.vae, given, name)
    return pipeline_of(run, transformer, vae, **_parts(checkpoint, run, transformer))


def _parts(checkpoint: Checkpoint, run: RunDescription, transformer: LatentModel) -> dict[str, Any]:
    """What the model's kind of condition needs: the classes' names, or what reads text."""
    if transformer.conditioned_on == "text":
        try:
            parts = load_text_parts(run.tokenizer, run.text_encoder, run.max_tokens)
        except InputError as error:
            raise InputError(f"the run's {error}") from error
        trained = checkpoint.read_metadata().get("text") if checkpoint.metadata.is_file() else None
        if trained is not None and (found := parts.made_by) != trained:
            raise InputError(
                f"it was trained with captions read by {trained}, and what lies there now is {found}",
                remedy="bring the run's tokenizer and text encoder back",
            )
        return parts._asdict()
    return {"class_names": _class_names(checkpoint)}


def _load_transformer(folder: Path, called: str | os.PathLike) -> LatentModel:
    if is_diffusers_folder(folder):
        return DiT.from_pretrained(folder, called=called)
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    family = find_class(kind)
    if family is None:
        raise InputError(f"{folder / 'config.json'}: _class_name={kind!r} is no model of gspn_dit.models")
    return family.from_pretrained(folder, use_safetensors=True)


def _class_names(checkpoint: Checkpoint) -> list[str] | None:
    return checkpoint.read_class_names() if checkpoint.class_names.is_file() else None


def _fitted(vae: AutoencoderKL, name: str, record: dict[str, Any]) -> AutoencoderKL:
    """A VAE that decodes as the one a model was trained with would, but for its weights, if they are others."""
    if record["sha256"] is not None and (own := vae_sha256(vae)) != record["sha256"]:
        decoder_alone = own["encoder"] == record["sha256"]["encoder"]
        what = "its decoder is another than that" if decoder_alone else "its weights are not those"
        warn(f"vae={name!r}: {what} of {record['name']!r}, which the model was trained with")
    adopt_normalisation(vae, record, "this model")
    return vae
