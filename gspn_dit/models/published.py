"""Weights of DiT and SiT that others have published, as a DiT of this package.

Three kinds are known:

- **DiT's own file:** a state dict with this package's names (which are DiT's), or a checkpoint of its training, whose
  averaged weights are taken. It predicts noise and variance.
- **SiT's own file:** the same names, another convention. With data x₁, noise x₀ and t from 0 to 1 it predicts the
  velocity x₁ - x₀ at t·x₁ + (1 - t)·x₀, and is told t (arXiv 2401.08740). Here the flow runs from data to noise: the
  last layer's sign is turned, and `time_embedding="sit"` turns the time. Channels beside the velocity, which SiT's code
  never reads, are dropped.
- **diffusers' folder:** a DiTTransformer2DModel, whose blocks each have a copy of the embedders.

Both kinds of files have the same names and shapes. A checkpoint of a training says which it is; elsewhere the channels
beside the prediction and the file's name do, unless they contradict each other. DiT learns a variance in these
channels; in SiT they start at zero and nothing ever moves them.

Files are read as tensors alone (`weights_only`): nothing of a file is run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.utils import is_accelerate_available
from safetensors.torch import load_file
from torch import Tensor

from gspn_dit.errors import InputError, is_of_files, machine_fault
from gspn_dit.layers.embeddings import sincos_positions
from gspn_dit.models.dit import SIZES, DiT

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=DiT)

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second before there was the first
CONVENTIONS = {"dit": "DiT", "sit": "SiT"}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_WANTED = f"weights of DiT or SiT ({', '.join(SUFFIXES)})"
_HEADS = {numbers["width"]: numbers["num_heads"] for numbers in SIZES.values()}  # which no weight's shape says
_TABLE = "y_embedder.embedding_table.weight"
_LAST = "final_layer.linear"

# This package's names, which are DiT's own, and those of diffusers.
_NETWORK = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    _TABLE: "class_embedder.embedding_table.weight",
}
# What a DiT is among the networks that DiTTransformer2DModel can be.
_DIFFUSERS_OPTIONS = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}


def find(
    kind: type[Model],
    path: str | os.PathLike,
    *,
    convention: str | None = None,
    called: str | os.PathLike | None = None,
    **kwargs: Any,
) -> Model | None:
    """The network of published weights, in eval mode; None for a folder of another kind.

    Args:
        kind: The class that it becomes.
        path: A file, a folder or a hub name.
        convention: Of a file that does not say it, as :func:`of_file` has it.
        called: What the line that says what is taken calls it, if not `path`.
        kwargs: As diffusers' `from_pretrained` has them.

    Raises :class:`InputError` for a file, or a network of diffusers, that is none of these, or for the convention of a
    folder; OSError for no folder.
    """
    if os.path.isfile(path):
        return of_file(kind, path, convention, called)
    if convention is not None:
        raise InputError("only a file of weights leaves it open", argument="convention", value=convention)
    options = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
    config = kind.load_config(path, **options)
    if not isinstance(config, Mapping):
        raise InputError(f"{os.fspath(path)}: its config.json is no model's", remedy="download it again")
    if config.get("_class_name") not in DIFFUSERS_CLASSES:
        return None
    return of_diffusers(kind, path, called, **kwargs)


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder is that of a transformer of diffusers, which may be a DiT."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):  # there is none, or it is damaged, which is said by who reads it
        return False
    return isinstance(config, dict) and config.get("_class_name") in DIFFUSERS_CLASSES


def of_file(
    kind: type[Model],
    path: str | os.PathLike,
    convention: str | None = None,
    called: str | os.PathLike | None = None,
) -> Model:
    """The network of a file of DiT's or SiT's own code.

    Args:
        kind: The class that it becomes.
        path: A state dict or a checkpoint, of torch or as safetensors.
        convention: `dit` (noise and variance) or `sit` (velocity), in place of what the file says.
        called: As :func:`find` has it.

    Raises :class:`InputError` if the file is none of these, or does not say which.
    """
    if convention not in (None, *CONVENTIONS):
        raise InputError(argument="convention", value=convention, wanted=f"one of {', '.join(CONVENTIONS)}")
    weights, nest, arguments = read_weights(Path(path))
    numbers = _numbers(weights)
    channels, predicted = numbers["in_channels"], numbers["out_channels"]
    if predicted not in (channels, 2 * channels):
        raise InputError(f"it takes {channels} channels and returns {predicted}", wanted=f"{channels} or twice as many")
    _network(kind, weights, numbers)
    convention = convention or _convention(Path(path).stem, weights, arguments, numbers)
    what = "noise and variance"
    if convention == "sit":
        _check_path_of_sit(arguments)
        for name in (f"{_LAST}.weight", f"{_LAST}.bias"):
            by_channel = weights[name].unflatten(0, (-1, predicted))  # (p · p, C_out, …)
            weights[name] = -by_channel[:, :channels].flatten(0, 1)
        what = "velocity" if predicted == channels else "velocity; variance channels dropped"
        numbers["out_channels"] = channels
    elif predicted == channels:
        raise InputError("it predicts noise without a variance", wanted="a DiT that predicts both")
    model = _build(kind, weights, {**numbers, "time_embedding": convention})
    _say(called or path, f"{CONVENTIONS[convention]}'s own checkpoint{f', its {nest}' if nest else ''}", model, what)
    return model


def of_diffusers(
    kind: type[Model], path: str | os.PathLike, called: str | os.PathLike | None = None, **kwargs: Any
) -> Model:
    """The network of a DiTTransformer2DModel, in a folder or on the hub.

    Args:
        kind: The class that it becomes.
        path: The folder or hub name.
        called: As :func:`find` has it.
        kwargs: As diffusers' `from_pretrained` has them.

    Raises :class:`InputError` if it is no DiT, or some of its weights are not there or cannot be read.
    """
    from diffusers import DiTTransformer2DModel

    kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
    try:
        network, info = DiTTransformer2DModel.from_pretrained(path, output_loading_info=True, **kwargs)
    except Exception as error:
        if not is_of_files(error):
            raise
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise InputError(f"its files cannot be read ({reason})", remedy="download it again") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{len(missing)} of the DiTTransformer2DModel's weights are not in it, such as {missing[0]}")
    config = network.config
    for name, wanted in _DIFFUSERS_OPTIONS.items():
        if config[name] != wanted:
            raise InputError(f"its {name} is {config[name]!r}", wanted=f"a DiT, which has {wanted!r}")
    if network.out_channels != 2 * config.in_channels:
        raise InputError(
            f"it takes {config.in_channels} channels and returns {network.out_channels}",
            wanted="a DiT that predicts noise and variance, twice as many",
        )
    weights = _as_of_dit(network.state_dict(), config.num_layers)
    side, rest = divmod(config.sample_size, config.patch_size)
    if rest:
        raise InputError(f"its patch of {config.patch_size} does not divide its sample_size, {config.sample_size}")
    positions = sincos_positions(side, side, network.inner_dim).flatten(1, 2)
    numbers = _numbers({**weights, "pos_embed": positions}, config.num_attention_heads)
    model = _build(kind, {**weights, "pos_embed": positions}, {**numbers, "time_embedding": "diffusers"})
    _say(called or path, "diffusers' DiTTransformer2DModel", model, "noise and variance")
    return model


def read_weights(path: Path) -> tuple[dict[str, Tensor], str, Mapping[str, Any]]:
    """The state dict of a file: its tensors by name, which of a checkpoint's they are, and its training's arguments.

    Raises :class:`InputError` for a file that holds something else, or more than tensors.
    """
    if path.suffix not in SUFFIXES:
        raise InputError("is a file", wanted=f"a folder, or {_WANTED}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path), "", {}
        with torch.serialization.safe_globals([argparse.Namespace]):  # a checkpoint's arguments: values with names
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can raise any
        if machine_fault(error) is not None:
            raise
        if objects := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"it holds an object, {objects[1]}, and reading that could run anything",
                wanted="tensors alone",
                remedy="where you trust it, load it in torch and save its state_dict()",
            ) from error
        of = "safetensors" if path.suffix == ".safetensors" else "torch"
        raise InputError(f"it cannot be read as a file of {of}", wanted=_WANTED, remedy="download it again") from error
    nest = next((name for name in ("ema", "model") if isinstance(found, Mapping) and name in found), "")
    weights = found[nest] if nest else found
    if not isinstance(weights, Mapping) or not all(isinstance(each, Tensor) for each in weights.values()):
        raise InputError(f"it holds a {type(weights).__name__} that is no state dict", wanted=_WANTED)
    arguments = found.get("args") if nest else None
    return dict(weights), nest, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _numbers(weights: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """The options of a DiT as the shapes of its weights say them."""
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        positions, rows = weights["pos_embed"].shape[1], len(weights[_TABLE])
        hidden, values = len(weights["blocks.0.mlp.fc1.weight"]), len(weights[f"{_LAST}.weight"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"its {len(weights)} tensors are not a DiT's, which has x_embedder.proj.weight, pos_embed and others",
            wanted=_WANTED,
        ) from error
    side = math.isqrt(positions)
    if side**2 != positions or values % patch**2:
        raise InputError(f"it has {positions} positions and {values} outputs a token", wanted="a square of tokens")
    if num_heads is None and width not in _HEADS:
        known = ", ".join(map(str, _HEADS))
        raise InputError(f"its width is {width}, and no weight says its heads", wanted=f"a published width: {known}")
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.([0-9]+)\.", name))}
    return {
        "width": width,
        "depth": len(blocks),
        "num_heads": num_heads or _HEADS[width],
        "mlp_ratio": hidden / width,
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": values // patch**2,
        "num_classes": rows - 1,
    }


def _convention(stem: str, weights: Mapping[str, Tensor], arguments: Mapping[str, Any], numbers: dict[str, Any]) -> str:
    """Whose a file is: as its training's arguments say, else its channels beside the prediction and its name.

    Channels of zeros are SiT's, unless the whole layer is zero, as both begin; others are DiT's. Raises
    :class:`InputError` if name and channels contradict each other, or neither says it.
    """
    for convention, name in CONVENTIONS.items():
        if str(arguments.get("model", "")).startswith(name):
            return convention
    channels, predicted = numbers["in_channels"], numbers["out_channels"]
    last = [weights[f"{_LAST}.{part}"] for part in ("weight", "bias")]
    beside = any(part.unflatten(0, (-1, predicted))[:, channels:].any() for part in last)
    named = [each for each in CONVENTIONS if re.search(rf"(?<![a-z]){each}(?![a-z])", stem.lower())]
    if predicted > channels and any(part.any() for part in last):
        found = "dit" if beside else "sit"
        if len(named) != 1 or named[0] == found:
            return found
        its, other = CONVENTIONS[found], CONVENTIONS[named[0]]
        problem = (
            f"its variance channels are {'not zero' if beside else 'zero'}, as {its}'s are, and its name says {other}"
        )
    elif len(named) == 1:
        return named[0]
    else:
        what = f"its {channels} output channels" if predicted == channels else "its last layer is zero: its channels"
        problem = f"{what} may be noise or a velocity"
    raise InputError(
        problem, wanted="a file that says whose it is", remedy="export it with --convention dit or --convention sit"
    )


def _check_path_of_sit(arguments: Mapping[str, Any]) -> None:
    for name, wanted in (("path_type", "Linear"), ("prediction", "velocity")):
        if (found := arguments.get(name, wanted)) != wanted:
            raise InputError(f"it was trained with {name} {found}", wanted=f"a SiT of {name} {wanted}")


def _as_of_dit(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The weights of a DiTTransformer2DModel by DiT's names; raises unless all blocks have the same embedders."""
    blocks = [f"transformer_blocks.{n}" for n in range(depth)]
    named = {ours: weights[f"{blocks[0]}.norm1.emb.{theirs}"] for ours, theirs in _EMBEDDERS.items()}
    for block in blocks[1:]:
        for ours, theirs in _EMBEDDERS.items():
            if not torch.equal(named[ours], weights[f"{block}.norm1.emb.{theirs}"]):
                raise InputError(f"{block} embeds times or classes otherwise than the first", wanted="a DiT")
    for part in ("weight", "bias"):
        for ours, theirs in _NETWORK.items():
            named[f"{ours}.{part}"] = weights[f"{theirs}.{part}"]
        for n, block in enumerate(blocks):
            for ours, theirs in _BLOCK.items():
                named[f"blocks.{n}.{ours}.{part}"] = weights[f"{block}.{theirs}.{part}"]
            three = [weights[f"{block}.attn1.to_{one}.{part}"] for one in "qkv"]
            named[f"blocks.{n}.attn.qkv.{part}"] = torch.cat(three)
    return named


def _build(kind: type[Model], weights: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Model:
    """A network of these numbers and weights, in float32 and in eval mode. Raises if the weights are not all of it."""
    model = _network(kind, weights, numbers)
    height, width = model.grid
    table = sincos_positions(height, width, numbers["width"]).flatten(1, 2)
    if not torch.allclose(weights["pos_embed"].float(), table, atol=1e-2):  # averaging moves it a little
        raise InputError("its pos_embed is not DiT's table of sines and cosines", wanted=_WANTED)
    copies = {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def _network(kind: type[Model], weights: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Model:
    """A network of these numbers on the meta device. Raises unless the weights have its names and shapes."""
    with torch.device("meta"):
        model = kind(**numbers)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in (*wanted, *weights):
        found = tuple(weights[name].shape) if name in weights else "not there"
        if name not in wanted or found != wanted[name]:
            needed = tuple(wanted[name]) if name in wanted else "no such weight"
            raise InputError(f"its {name} is {found}, and a DiT of that size has {needed}", wanted=_WANTED)
        if not weights[name].is_floating_point():
            raise InputError(f"its {name} is {weights[name].dtype}", wanted="weights in floating point")
    return model


def _say(path: str | os.PathLike, origin: str, model: DiT, what: str) -> None:
    config = model.config
    logger.info(
        f"{os.fspath(path)}: {origin}: {config.depth} blocks of {config.width}, {config.num_classes} classes, "
        f"{config.sample_size} × {config.sample_size} latents; {what}",
        extra={"stderr": True},
    )
