"""Classification in stages: the GSPN paper's networks (arXiv 2501.12381, section 4.1), and ours of the same design."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gspn_dit.errors import InputError, is_finite, is_whole
from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.layers.drop_path import drop_path
from gspn_dit.layers.feed_forward import FeedForward
from gspn_dit.layers.gspn_core import GSPNCore
from gspn_dit.layers.linear import linear
from gspn_dit.layers.mixers import MIXERS, Projections
from gspn_dit.layers.norm import ChannelNorm, GlobalResponseNorm
from gspn_dit.models.features import FeatureMaps, chosen_stages
from gspn_dit.models.registry import check_options, no_such_model
from gspn_dit.models.saved_model import SavedModel, require_count

# Constructor arguments of each name. The paper's are first; its table has 9.0 GMACs for S, but the configuration that
# its authors give for S, this one, has 12.0.
SIZES: dict[str, dict[str, Any]] = {
    "gspn-t": {
        "widths": (96, 192, 384, 768),
        "depths": (2, 2, 7, 2),
        "mixer": "gspn-per-channel",
        "chunks": (2, 2, None, None),
        "rank": 8,
        "drop_path_rate": 0.2,
    },
    "gspn-s": {
        "widths": (108, 216, 432, 864),
        "depths": (5, 5, 10, 2),
        "mixer": "gspn-per-channel",
        "chunks": (2, 2, 2, None),
        "rank": 16,
        "drop_path_rate": 0.4,
    },
    "gspn-b": {
        "widths": (120, 240, 480, 960),
        "depths": (4, 4, 15, 4),
        "mixer": "gspn-per-channel",
        "chunks": (2, 2, None, None),
        "rank": 8,
        "drop_path_rate": 0.5,
    },
    "gspn-grouped-t": {
        "widths": (96, 192, 384, 768),
        "depths": (2, 2, 7, 2),
        "chunks": (8, 8, None, None),
        "drop_path_rate": 0.2,
    },
    "gspn-grouped-s": {
        "widths": (96, 192, 384, 768),
        "depths": (2, 2, 21, 2),
        "chunks": (8, 8, None, None),
        "drop_path_rate": 0.4,
    },
    "gspn-grouped-b": {
        "widths": (128, 256, 512, 1024),
        "depths": (2, 2, 21, 2),
        "chunks": (8, 8, None, None),
        "drop_path_rate": 0.5,
    },
    "gspn-grouped-pico": {  # for pictures of 28 pixels
        "widths": (64, 128),
        "depths": (2, 4),
        "stem_stride": 2,
        "in_chans": 1,
        "num_classes": 10,
        "pretrained_cfg": {"input_size": (1, 28, 28), "crop_pct": 1.0, "mean": (0.5,), "std": (0.5,)},
    },
}
PER_CHANNEL = "gspn-per-channel"
CLASSIFIER_MIXERS = (*MIXERS, PER_CHANNEL)

# What a model's images are like, and what its first and last layers are called, in the words of timm.
PREPARATION: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "fixed_input_size": False,
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "stem.conv1",
    "classifier": "head",
}


def list_classifiers(pattern: str = "*") -> list[str]:
    """The names that :func:`create_classifier` knows. The pattern is a shell's: `gspn-grouped-*` gives ours alone."""
    return [name for name in SIZES if fnmatchcase(name, pattern)]


def check_classifier(name: str) -> None:
    """Raise :class:`InputError` unless a classifier has that name."""
    if name not in SIZES:
        raise no_such_model(name, SIZES)


@overload
def create_classifier(name: str, *, features_only: Literal[False] = False, **overrides: Any) -> GSPNClassifier: ...


@overload
def create_classifier(
    name: str, *, features_only: Literal[True], out_indices: Sequence[int] | int | None = None, **overrides: Any
) -> FeatureMaps: ...


def create_classifier(
    name: str, *, features_only: bool = False, out_indices: Sequence[int] | int | None = None, **overrides: Any
) -> GSPNClassifier | FeatureMaps:
    """A new classifier by name, freshly initialised, in training mode on the default device.

    Args:
        name: One of :func:`list_classifiers`.
        features_only: Give the maps of stages in place of classes, for detection and segmentation.
        out_indices: Which stages those are: a list of indices, or a number of last ones; all if not given.
        overrides: Constructor arguments of :class:`GSPNClassifier` in place of the name's. Of `pretrained_cfg`, only
            the entries given are replaced.

    Raises:
        InputError: An unknown name, override or stage, or a value that the model cannot take.
    """
    check_classifier(name)
    check_options(name, GSPNClassifier, overrides)
    if out_indices is not None and not features_only:
        raise InputError(
            "belongs to features_only=True", argument="out_indices", value=out_indices, remedy="give both or neither"
        )
    numbers = {**SIZES[name], **overrides}
    numbers["pretrained_cfg"] = {**SIZES[name].get("pretrained_cfg", {}), **(overrides.get("pretrained_cfg") or {})}
    model = GSPNClassifier(**numbers)
    return FeatureMaps(model, out_indices) if features_only else model


@dataclass(frozen=True)
class Stage:
    """What a stage of a classifier is made of.

    Attributes:
        width: Channels C of its tokens.
        depth: Blocks.
        mixer: How tokens exchange information, one of `CLASSIFIER_MIXERS`.
        chunk: Lines that its scans run over; None is the whole map.
    """

    width: int
    depth: int
    mixer: str
    chunk: int | None

    def __post_init__(self) -> None:
        require_count("widths", self.width)
        require_count("depths", self.depth)
        if self.mixer not in CLASSIFIER_MIXERS:
            raise InputError(f"give one of {', '.join(CLASSIFIER_MIXERS)}", argument="mixer", value=self.mixer)
        if self.chunk is not None:
            require_count("chunks", self.chunk)


class GSPNClassifier(SavedModel):
    """A stem, stages of blocks with a convolution of stride 2 between them, a mean over the map, a linear layer.

    Called as model(images (B, in_chans, h, w)) → logits (B, num_classes), for any h and w: nothing in it knows a place.
    It answers what timm asks of its models, whether timm is there or not.

    Args:
        widths: Channels of each stage's tokens.
        depths: Blocks of each stage.
        mixer: How tokens exchange information, for all stages or one for each: `gspn`, scans whose gates groups of
            channels share, as in gspn-dit; `gspn-per-channel`, the paper's; or for comparison softmax `attention`,
            `linear` attention, attention in `window`s, or a depthwise `conv` (:mod:`gspn_dit.layers.mixers`).
        chunks: Lines that scans run over, for all stages or one for each; None is the whole map. A mixer without scans
            does not heed them.
        stem_stride: Pixels from one token of the first stage to the next: 4, 2 or 1.
        group_width: Channels of a group, in all mixers but the paper's; a divisor of each width.
        conv_kernel: Side of the depthwise filter before the mixing, odd, in all mixers but the paper's, which has 7.
        rank: Channels of the proxy that the paper's mixer computes its gates from.
        mlp_ratio: Hidden width of the feed-forward over C.
        drop_path_rate: Chance that training skips a branch of the last block; it rises linearly from 0 at the first.
        drop_rate: Chance that training drops a value before the last layer.
        num_classes: Classes; 0 leaves the last layer out.
        in_chans: Channels of the images.
        global_pool: `avg`, or nothing to leave the map as it is, with logits of each token, (B, num_classes, H, W).
        pretrained_cfg: How images are prepared for the model, and more that goes with its weights: entries in place of
            those of `PREPARATION`, and any of your own that JSON can hold.

    Attributes:
        specs: The :class:`Stage` of each stage.
        num_features: Channels of the last stage's tokens.
        feature_info: Channels, stride in pixels and name of each stage.
        pretrained_cfg: As the argument, but all of it, also as `default_cfg`; it is saved with the model.

    Raises:
        InputError: Numbers that do not fit each other; at the call, misshapen images.
    """

    _no_split_modules: ClassVar[list[str]] = ["ClassifierBlock"]  # what FSDP shards and gathers as one
    _repeated_blocks: ClassVar[list[str]] = ["ClassifierBlock"]  # what compile_repeated_blocks compiles one by one

    @register_to_config
    def __init__(
        self,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 7, 2),
        mixer: str | Sequence[str] = "gspn",
        chunks: int | Sequence[int | None] | None = None,
        stem_stride: int = 4,
        group_width: int = 32,
        conv_kernel: int = 3,
        rank: int = 8,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Literal["avg", ""] = "avg",
        pretrained_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_count("in_chans", in_chans)
        for name, value in {"group_width": group_width, "rank": rank}.items():
            require_count(name, value)
        for name, chance in {"drop_path_rate": drop_path_rate, "drop_rate": drop_rate}.items():
            if not is_finite(chance) or not 0 <= chance < 1:
                raise InputError("give a chance in [0, 1)", argument=name, value=chance)
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.specs = stages_of(widths, depths, mixer, chunks)
        self.stem = Stem(in_chans, self.specs[0].width, stem_stride)
        last = max(sum(spec.depth for spec in self.specs) - 1, 1)
        self.stages = nn.ModuleList()
        block = 0
        for i, spec in enumerate(self.specs):
            blocks = [
                ClassifierBlock(
                    spec.width,
                    make_mixer(spec, layer, group_width=group_width, conv_kernel=conv_kernel, rank=rank),
                    mlp_ratio,
                    drop_path_rate * (block + layer) / last,
                )
                for layer in range(spec.depth)
            ]
            block += spec.depth
            self.stages.append(ClassifierStage(self.specs[i - 1].width if i else None, spec, blocks))
        self.norm: nn.Module = ChannelNorm(self.specs[-1].width)
        self.num_features = self.head_hidden_size = self.specs[-1].width
        self.feature_info = [
            {"num_chs": spec.width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, spec in enumerate(self.specs)
        ]
        self.reset_classifier(num_classes, global_pool)
        self.pretrained_cfg = self.default_cfg = preparation(pretrained_cfg, in_chans, num_classes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """A saved classifier in evaluation mode, by its folder or its name on the Hugging Face hub.

        Raises:
            InputError: There is no model there, one of another kind, or one that lacks weights.
        """
        place, wanted = str(pretrained_model_name_or_path), "the folder of a saved classifier (config.json)"
        try:
            kind = cls.load_config(place).get("_class_name")
        except (OSError, ValueError) as error:
            reason = "is no folder" if not os.path.isdir(place) else "has no config.json that can be read"
            raise InputError(reason, argument="model", value=place, wanted=wanted) from error
        if kind != cls.__name__:
            raise InputError(f"holds a model of the kind {kind}", argument="model", value=place, wanted=wanted)
        try:
            return super().from_pretrained(place, **kwargs)
        except OSError as error:
            reason = f"its weights cannot be read ({' '.join(str(error).split())[:200]})"
            raise InputError(reason, argument="model", value=place, wanted=wanted) from error

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; what `pretrained_cfg` has become since the model was made is saved."""
        changed = {
            key: value
            for key, value in self.pretrained_cfg.items()
            if key != "num_classes" and PREPARATION.get(key) != value
        }
        self.record(pretrained_cfg=changed)
        super().save_config(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last stage's tokens after the last norm, (B, C, H, W), a view with channels last in memory."""
        x = self.embed(images)
        for stage in self.stages:
            x = stage(x, self.run)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what :meth:`forward_features` gave, or with `pre_logits` what the last layer would be given."""
        x = x.permute(0, 2, 3, 1)
        if self.global_pool:
            x = x.mean((1, 2))
        x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What stages give, as maps (B, C, H, W).

        Args:
            images: As :meth:`forward`.
            indices: Which stages: a list of indices, or a number of last ones; None is all.
            norm: Whether the last stage's map is that after the last norm.
            stop_early: Whether stages after the last that is asked for are left out.
            output_fmt: `NCHW`, or `NHWC` for (B, H, W, C).
            intermediates_only: Give the list of maps alone, not (what :meth:`forward_features` gives, list of maps).

        Raises:
            InputError: Another format, or a stage that is not there.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise InputError("give NCHW or NHWC", argument="output_fmt", value=output_fmt)
        chosen = chosen_stages(len(self.stages), indices)
        stages = self.stages[: max(chosen) + 1] if stop_early else self.stages
        x, maps = self.embed(images), []
        for i, stage in enumerate(stages):
            x = stage(x, self.run)
            if i in chosen:
                maps.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        if output_fmt == "NCHW":
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        if intermediates_only:
            return maps
        last = self.norm(x) if len(stages) == len(self.stages) else x
        return last.permute(0, 3, 1, 2), maps

    def prune_intermediate_layers(
        self, indices: Sequence[int] | int = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove stages after the last of those that `indices` name, and with them or if asked for, norm and head.

        Returns:
            The indices of the stages named.
        """
        chosen = chosen_stages(len(self.stages), indices)
        shorter = max(chosen) < len(self.stages) - 1
        self.stages = self.stages[: max(chosen) + 1]
        if shorter:
            self.num_features = self.head_hidden_size = self.specs[max(chosen)].width
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return chosen

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, h, w) as tokens (B, H, W, C). Raises :class:`InputError` if they are misshapen."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise InputError(
                f"shape {tuple(images.shape)}", argument="images", wanted=f"(B, {self.in_chans}, height, width)"
            )
        return self.stem(images)

    def example_inputs(self, size: tuple[int, int], condition: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Forward's tensors for one image of that height and width. It takes no condition: one would be refused."""
        return {"images": torch.zeros(1, self.in_chans, *size, device=self.device), **(condition or {})}

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for so many classes, none for 0; and another pooling, if one is given."""
        if not is_whole(num_classes) or num_classes < 0:
            raise InputError("give a whole number from 0", argument="num_classes", value=num_classes)
        if global_pool not in (None, "avg", ""):
            raise InputError("give avg, or nothing for no pooling", argument="global_pool", value=global_pool)
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.record(num_classes=num_classes, global_pool=self.global_pool)

    def record(self, **values: Any) -> None:
        """Have other values in the configuration; diffusers would make a new model of it with the defaults instead."""
        defaults = [name for name in self.config.get("_use_default_values", []) if name not in values]
        self.register_to_config(**values, _use_default_values=defaults)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps blocks' inputs alone and computes the blocks once more in the backward pass."""
        (self.enable_gradient_checkpointing if enable else self.disable_gradient_checkpointing)()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm sorts parameters into layers; coarse makes a layer of every stage."""
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of matrices that are no weights of inputs: decays, scales and sums of directions."""
        kinds = ("log_rate", "scale", "merge")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in kinds}


def stages_of(
    widths: Sequence[int],
    depths: Sequence[int],
    mixer: str | Sequence[str],
    chunks: int | Sequence[int | None] | None,
) -> list[Stage]:
    """The stages of a classifier. Raises :class:`InputError` for lists of different lengths, or what no stage takes."""
    if isinstance(widths, str) or not isinstance(widths, Sequence) or not widths:
        raise InputError("give a list, a number of channels for each stage", argument="widths", value=widths)
    lists: list[Sequence[Any]] = [widths]
    for name, value in {"depths": depths, "mixer": mixer, "chunks": chunks}.items():
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        each = value if listed or name == "depths" else [value] * len(widths)
        if not isinstance(each, Sequence) or len(each) != len(widths):
            raise InputError(f"give one for each of the {len(widths)} stages of widths", argument=name, value=value)
        lists.append(each)
    return [Stage(*each) for each in zip(*lists, strict=True)]


def preparation(given: Mapping[str, Any] | None, in_chans: int, num_classes: int) -> dict[str, Any]:
    """`PREPARATION` with the entries given, for images of that many channels: else each gets the channels' mean."""
    cfg = {**PREPARATION, **(given or {}), "num_classes": num_classes}
    for key in ("input_size", "pool_size", "mean", "std"):
        cfg[key] = tuple(cfg[key])  # JSON has lists
    cfg["input_size"] = (in_chans, *cfg["input_size"][1:])
    for key in ("mean", "std"):
        if len(cfg[key]) != in_chans:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * in_chans
    return cfg


class Stem(nn.Module):
    """Two 3 × 3 convolutions, each with a norm: images (B, C_in, h, w) to tokens (B, H, W, C).

    Args:
        stride: 4, 2 or 1: both convolutions have stride 2, the first alone, or none.
    """

    def __init__(self, in_chans: int, width: int, stride: int) -> None:
        if stride not in (4, 2, 1):
            raise InputError("give 4, 2 or 1", argument="stem_stride", value=stride)
        super().__init__()
        half = max(width // 2, 1)
        self.conv1 = nn.Conv2d(in_chans, half, 3, stride=2 if stride > 1 else 1, padding=1)
        self.norm1 = ChannelNorm(half)
        self.conv2 = nn.Conv2d(half, width, 3, stride=2 if stride > 2 else 1, padding=1)
        self.norm2 = ChannelNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        # Turning the few channels of the images here lets convolutions write channels last, without a copy.
        images = images.contiguous(memory_format=torch.channels_last)
        x = F.gelu(self.norm1(self.conv1(images).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A 3 × 3 convolution of stride 2 and a norm, (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C) or whatever the width is."""

    def __init__(self, width_before: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_before, width, 3, stride=2, padding=1)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ClassifierStage(nn.Module):
    """A downsampling, but in the first stage, and blocks: (B, H, W, C before) to (B, ⌈H/2⌉, ⌈W/2⌉, C).

    Called as stage(x, run) with what runs a block: :meth:`GSPNClassifier.run`, which may recompute it.

    Args:
        width_before: Channels of the stage before, None for the first stage.
    """

    def __init__(self, width_before: int | None, spec: Stage, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.chunk = None if spec.mixer in MIXERS and not MIXERS[spec.mixer].scans else spec.chunk
        self.downsample = None if width_before is None else Downsample(width_before, spec.width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = run(block, x, self.chunk)
        return x


class ClassifierBlock(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)), with branches that training drops by chance."""

    def __init__(self, width: int, mixer: nn.Module, mlp_ratio: float, drop_chance: float) -> None:
        super().__init__()
        self.drop_chance = drop_chance
        self.norm1, self.mixer = ChannelNorm(width), mixer
        self.norm2, self.mlp = ChannelNorm(width), FeedForward(width, mlp_ratio, nn.GELU())

    def forward(self, x: Tensor, chunk: int | None = None) -> Tensor:
        x = x + drop_path(self.mixer(self.norm1(x), chunk), self.drop_chance, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_chance, self.training)


class PerChannelMixer(nn.Module):
    """The mixer of the paper's classifiers, (B, H, W, C) to (B, H, W, C), on e = 1.5C channels:

        y = W_out GRN(norm(core(conv₇(W_in x))))

    core is the paper's scan with gates for every channel (:class:`gspn_dit.layers.gspn_core.GSPNCore`), conv₇ a
    depthwise 7 × 7 convolution, norm a LayerNorm and GRN a global response norm.

    Args:
        width: Channels C.
        rank: Channels of the core's proxy.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        inner = width * 3 // 2
        self.proj_in = linear(width, inner, bias=False)
        self.conv = DepthwiseConv(inner, 7, bias=False)
        self.core = GSPNCore(inner, rank)
        self.norm = ChannelNorm(inner)
        self.response_norm = GlobalResponseNorm(inner)
        self.proj_out = linear(inner, width, bias=False)

    def forward(self, x: Tensor, chunk: int | None = None) -> Tensor:
        y = self.core(self.conv(self.proj_in(x)), chunk)
        return self.proj_out(self.response_norm(self.norm(y)))


def make_mixer(spec: Stage, layer: int, *, group_width: int, conv_kernel: int, rank: int) -> nn.Module:
    """The mixer of a stage's layer 0, 1, …, for a width that groups divide."""
    if spec.mixer == PER_CHANNEL:
        return PerChannelMixer(spec.width, rank)
    if spec.width % group_width:
        raise InputError(f"give a divisor of the width {spec.width}", argument="group_width", value=group_width)
    groups = spec.width // group_width
    return MIXERS[spec.mixer].of_layer(layer, spec.width, groups, Projections(conv_kernel))
