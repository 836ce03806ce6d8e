"""Replacing the self-attention of Stable Diffusion's U-Nets: the layers apart, mounted on a U-Net and taken off again.

    replacement = replace_self_attention(pipeline)  # layers from the weights of its attention, not mounted yet
    replacement.mount(pipeline)  # the pipeline now uses them
    replacement.unmount()  # its own modules stand in their places again
    replacement.save_pretrained("folder")
    replacement = AttentionReplacement.from_pretrained("folder")

Replaced is `attn1` of every BasicTransformerBlock, the self-attention. All else stays as it is and where it is: a
replacement holds its own layers alone.

The layers need the size of their map, which tokens do not show. A hook on each Transformer2DModel, which has the map,
puts it among the arguments that it passes to its blocks; a hook on each block takes it out and gives it to the layer.
So it is right where blocks are recomputed, and at sizes that a U-Net's levels round up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gspn_dit import __version__
from gspn_dit.errors import InputError, shorten
from gspn_dit.layers.chunks import Chunk, as_windows, chunk_by_layer
from gspn_dit.layers.windows import Window
from gspn_dit.models.replaced_attention import REPLACEMENTS, FreshAttention, ReplacedAttention
from gspn_dit.models.saved_model import SavedModel

SUPPORTED = "the U-Net (UNet2DConditionModel) of SD 1.x, SD 2.x or SD-XL, or a pipeline that has one"
MAP_SIZE = "gspn_dit_map_size"  # the name of the size among a block's cross_attention_kwargs
KWARGS_PLACE = list(signature(BasicTransformerBlock.forward).parameters).index("cross_attention_kwargs") - 1


def replace_self_attention(
    model: Any,
    mixer: str = "gspn",
    layers: str | Sequence[str] = "all",
    keep_attention: str | Sequence[str] = (),
    *,
    chunk: int | None = 32,
    windows: str | None = "shifted",
    global_layers: str | Sequence[int] | Sequence[str] = "mid_block",
    base_model: str | None = None,
    seed: int | None = None,
) -> AttentionReplacement:
    """Layers that can take the place of a U-Net's self-attention, made from its weights, and not mounted yet.

    Which layers is said by names. A name is that of an attention, such as
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1", or of what holds some, such as "mid_block" or
    "up_blocks.1"; "levels=0,1" are those of these levels, where 0 has the size of the latents and each next one half of
    it; "all" are all. A list of those is their union.

    Args:
        model: A UNet2DConditionModel, or a pipeline that has one.
        mixer: What stands for the attention: `gspn`, line scans from its Q, K and V; `fresh`, new line scans that keep
            nothing of it; or, for comparison, `linear` attention and attention within a `window`, which keep Q, K, V.
        layers: Which attentions are replaced.
        keep_attention: Which of them are not.
        chunk: Lines that a scan runs over, or the side of a window; None is the whole map in every layer.
        windows: `shifted` for windows of chunk × chunk tokens, whose grid lies half a window further down and to the
            right in every second layer of a level; `aligned` for the same grid in all; None for chunks of lines.
        global_layers: Which layers take the whole map whatever the chunk; () for none.
        base_model: The name of the model that the layers are for, kept in their config; None is what it calls itself.
        seed: For the weights that are new, which are then the same on every device, and torch's own generators stay
            as they are; None takes them from torch's generator of the model's device.

    Raises:
        InputError: A model, a mixer or a choice of layers that there is not.
    """
    unet = unet_of(model)
    places = attention_places(unet)
    kept = choose(places, "keep_attention", keep_attention)
    chosen = [name for name in choose(places, "layers", layers) if name not in kept]
    if not chosen:
        raise InputError(
            "no layer is left to replace",
            argument="keep_attention",
            value=keep_attention,
            remedy=f"keep fewer of layers={shorten(layers)}",
        )
    if mixer not in REPLACEMENTS:
        raise InputError(f"give one of {', '.join(REPLACEMENTS)}", argument="mixer", value=mixer)
    whole = choose(places, "global_layers", global_layers)
    if not REPLACEMENTS[mixer].sees_chunk:
        chunk = None
    chunks: dict[str, Chunk] = {}
    for level in {places[name].level for name in chosen}:  # grids of windows alternate within a level
        names = [name for name in chosen if places[name].level == level]
        of_level = chunk_by_layer(chunk, [i for i, name in enumerate(names) if name in whole], len(names))
        chunks |= zip(names, as_windows(of_level, windows), strict=True)
    layer_configs = [
        {"name": name, "mixer": mixer, "chunk": written(chunks[name]), **shape_of(name, places[name].attention)}
        for name in chosen
    ]
    first = next(unet.parameters())
    drawn_on = first.device if seed is None or first.is_meta else torch.device("cpu")
    with torch.random.fork_rng(enabled=seed is not None, devices=[]), drawn_on:
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # the CPU's: torch.manual_seed would change every GPU's, too
        replacement = AttentionReplacement(layer_configs, base_model or name_of(model) or name_of(unet))
    # diffusers' own warns of modules to keep in float32: there are none
    nn.Module.to(replacement, first.device, first.dtype)
    for name in chosen:
        if replacement.layer(name).keeps_projections:
            replacement.layer(name).load_state_dict(places[name].attention.state_dict(), strict=False)
    return replacement


class AttentionReplacement(SavedModel):
    """Layers that stand in the places of a U-Net's self-attentions while they are mounted.

    It holds its own layers alone, and saves and loads them (`save_pretrained`, `from_pretrained`). Their keys are those
    that they have in the U-Net. Mounted, it can be called as the U-Net, which is then run with these layers; its
    parameters are theirs alone.

    A mounted replacement's copy (`copy.deepcopy`) is not mounted; a mounted U-Net's copy has copies of the layers.

    Args:
        layers: One mapping for each layer: its `name` in the U-Net, its `mixer`, `channels`, `heads` and `chunk`, and
            `bias`, `out_bias` and `dropout` of its projections.
        base_model: The model that the layers are for.
        version: Of this package, when the layers were made.

    Raises:
        InputError: A mixer that there is not, or heads that do not divide the channels.
    """

    _supports_gradient_checkpointing = False  # it is the U-Net that recomputes its blocks

    @register_to_config
    def __init__(
        self, layers: Sequence[Mapping[str, Any]], base_model: str | None = None, version: str | None = None
    ) -> None:
        super().__init__()
        if version is None:
            self.register_to_config(version=__version__)
        self.layer_names = [config["name"] for config in layers]
        self._mounting: Mounting | None = None
        for config in layers:
            if config["mixer"] not in REPLACEMENTS:
                raise InputError(f"give one of {', '.join(REPLACEMENTS)}", argument="mixer", value=config["mixer"])
            options = {key: value for key, value in config.items() if key not in ("name", "mixer", "chunk")}
            layer = REPLACEMENTS[config["mixer"]](**options, chunk=read(config["chunk"]))
            put(self, config["name"], layer)

    def layer(self, name: str) -> ReplacedAttention | FreshAttention:
        """The layer of this name."""
        return self.get_submodule(name)

    @property
    def sizes(self) -> dict[str, tuple[int, int] | None]:
        """The size (H, W) that each layer's map had at the U-Net's last call, whether or not the layers were in it."""
        return {name: self.layer(name).size for name in self.layer_names}

    @property
    def unet(self) -> UNet2DConditionModel | None:
        """The U-Net that it is mounted on."""
        return None if self._mounting is None else self._mounting.unet

    def mount(self, model: Any, dtype: torch.dtype | None = None) -> AttentionReplacement:
        """Put the layers in the places of the U-Net's attentions, on their device.

        Mount before adapters (LoRA) are loaded and before sequential offload is enabled.

        Args:
            model: A UNet2DConditionModel, or a pipeline that has one.
            dtype: Of the layers from now on, such as float32 to train them under autocast; None is the U-Net's.

        Returns:
            The replacement.

        Raises:
            InputError: It is mounted already, or the model has no place for these layers.
        """
        if self._mounting is not None:
            raise InputError("the replacement is mounted", remedy="unmount() it first")
        unet = unet_of(model)
        places = attention_places(unet)
        for config in self.config.layers:
            if (place := places.get(config["name"])) is None:
                raise InputError(
                    f"the U-Net has no self-attention {config['name']}",
                    remedy=f"mount on {self.config.base_model or 'the model that the layers were made for'}, or on one "
                    "of its architecture",
                )
            wanted = {key: config[key] for key in ("channels", "heads")}
            there = {key: value for key, value in shape_of(config["name"], place.attention).items() if key in wanted}
            if there != wanted:
                said = " and ".join(f"{there[key]} {key}, not {wanted[key]}" for key in wanted)
                raise InputError(
                    f"{config['name']} of the U-Net has {said}",
                    remedy=f"mount on {self.config.base_model or 'the model that the layers were made for'}, or on one "
                    "of its architecture",
                )
        like = reference(next(iter(places.values())).block)
        if like.is_meta and self.device.type != "meta":
            raise InputError(
                "the U-Net has no weights (it is on the meta device)", argument="model", remedy="load them first"
            )
        nn.Module.to(self, like.device, dtype or like.dtype)
        self._mounting = Mounting(unet, {name: self.layer(name) for name in self.layer_names}, places)
        return self

    def unmount(self) -> None:
        """Let the U-Net's own modules stand in their places again, the same ones, on the U-Net's device and dtype.

        Raises:
            InputError: It isn't mounted, or its weights are away by sequential offload.
        """
        self._mounted().remove()
        self._mounting = None

    @contextmanager
    def unmounted(self) -> Iterator[None]:
        """In the block, the U-Net runs with its own attentions, as the teacher of the layers; their sizes are noted."""
        mounting = self._mounted()
        before = mounting.standing()
        try:
            mounting.put_originals()
            yield
        finally:
            if self._mounting is mounting:  # not if it was unmounted in the block
                mounting.put(before)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The U-Net's forward, with these layers."""
        return self._mounted().unet(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; without the projections that `fuse_qkv_projections` makes of the layers' own.

        Raises:
            InputError: Other weights than its own are in the layers: a LoRA's, or none as they are offloaded.
        """
        foreign = [key for key, value in self.state_dict().items() if ".base_layer." in key or value.is_meta]
        if foreign:
            raise InputError(
                f"weights of the layers are an adapter's or offloaded, such as {foreign[0]}",
                remedy="unload the LoRA or remove the pipeline's hooks first",
            )
        super().save_pretrained(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The layers' weights, without the projections that `fuse_qkv_projections` makes of them."""
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if ".to_qkv." not in key}

    def _mounted(self) -> Mounting:
        if self._mounting is None:
            raise InputError("the replacement is not mounted", remedy="mount() it on a U-Net or a pipeline first")
        return self._mounting


@dataclass(frozen=True)
class Place:
    """Where a U-Net has a self-attention.

    Attributes:
        block: The block whose `attn1` it is.
        attention: The module there.
        level: How often the latents' size is halved on the way to its map.
    """

    block: Any
    attention: Any
    level: int


class Mounting:
    """Layers in the places of a U-Net's attentions, and the hooks that give them their maps' sizes.

    A copy of what holds one has None in its place: it isn't mounted.
    """

    def __init__(self, unet: nn.Module, layers: Mapping[str, nn.Module], places: Mapping[str, Place]) -> None:
        self.unet = unet
        self.layers = dict(layers)
        self.originals: dict[str, Any] = {name: places[name].attention for name in layers}
        self.blocks = {name: places[name].block for name in layers}
        self.handles: list[RemovableHandle] = []
        by_block = {id(block): self.layers[name] for name, block in self.blocks.items()}
        for transformer in unet.modules():
            if isinstance(transformer, Transformer2DModel):
                self.handles.append(transformer.register_forward_pre_hook(send_size, with_kwargs=True))
                for block in transformer.transformer_blocks:
                    hook = TakesSize(by_block.get(id(block)))
                    self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self.put(self.layers)

    def standing(self) -> dict[str, Any]:
        """What stands in each place now."""
        return {name: block.attn1 for name, block in self.blocks.items()}

    def put(self, modules: Mapping[str, Any]) -> None:
        for name, block in self.blocks.items():
            block.attn1 = modules[name]

    def put_originals(self) -> None:
        """Put all originals in their places, or none if one cannot be moved to the U-Net's device."""
        for name, block in self.blocks.items():
            like, original = reference(block), self.originals[name]
            if like.is_meta and not original.to_q.weight.is_meta:
                raise InputError(
                    "the U-Net's weights are away by enable_sequential_cpu_offload",
                    remedy="remove_all_hooks() of the pipeline first",
                )
            original.to(like.device, like.dtype)
        self.put(self.originals)

    def remove(self) -> None:
        self.put_originals()
        for handle in self.handles:
            handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def send_size(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before a Transformer2DModel: the size of its map goes along to its blocks."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    given = kwargs.get("cross_attention_kwargs") or {}
    return args, {**kwargs, "cross_attention_kwargs": {**given, MAP_SIZE: tuple(hidden_states.shape[-2:])}}


class TakesSize:
    """A hook before a block: it takes the size out of the arguments, and gives it to the block's layer if it has one.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional = len(args) > KWARGS_PLACE  # as where blocks are recomputed
        given = dict(args[KWARGS_PLACE] if positional else kwargs["cross_attention_kwargs"])
        size = given.pop(MAP_SIZE)
        if self.layer is not None:
            self.layer.size = size
        if positional:
            return (*args[:KWARGS_PLACE], given, *args[KWARGS_PLACE + 1 :]), kwargs
        return args, {**kwargs, "cross_attention_kwargs": given}


def unet_of(model: Any) -> UNet2DConditionModel:
    """The U-Net of a pipeline, or the model itself if it is one; without torch.compile's wrapping."""
    unet = getattr(model, "unet", model) if not isinstance(model, nn.Module) else model
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise InputError(f"a {type(unet).__name__} is not supported", argument="model", wanted=SUPPORTED)
    return unet


def name_of(model: Any) -> str | None:
    """What a model or a pipeline calls itself, if it does: its hub name, or its folder."""
    name = (getattr(model, "config", None) or {}).get("_name_or_path")
    return str(name) if name else None


def attention_places(unet: UNet2DConditionModel) -> dict[str, Place]:
    """The U-Net's self-attentions by name, in the order in which they run.

    Raises:
        InputError: There are none, or they are replaced already.
    """
    depth = len(unet.down_blocks)
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    places: dict[str, Place] = {}
    blocks = [
        (name, block)
        for name, block in unet.named_modules()
        if isinstance(block, BasicTransformerBlock) and name.split(".")[0] in order
    ]
    for name, block in sorted(blocks, key=lambda named: order[named[0].split(".")[0]]):
        part, index = name.split(".")[:2]
        level = {"down_blocks": 0, "mid_block": depth - 1, "up_blocks": depth - 1}[part]
        if part != "mid_block":
            level = int(index) if part == "down_blocks" else depth - 1 - int(index)
        places[f"{name}.attn1"] = Place(block, block.attn1, level)
    if not places:
        raise InputError("the U-Net has no self-attention (attn1)", argument="model", wanted=SUPPORTED)
    if any(isinstance(place.attention, ReplacedAttention | FreshAttention) for place in places.values()):
        raise InputError("the U-Net's attention is replaced already", argument="model", remedy="unmount() that first")
    return places


def shape_of(name: str, attention: Any) -> dict[str, Any]:
    """The options of the layer that takes this attention's place.

    Raises:
        InputError: It is more than a self-attention with projections of its own, or its weights are out of reach.
    """
    plain = (
        isinstance(attention, Attention)
        and not attention.is_cross_attention
        and attention.added_kv_proj_dim is None
        and not any((attention.group_norm, attention.spatial_norm, attention.norm_q, attention.norm_k))
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )
    if not plain:
        raise InputError(f"{name} is not the self-attention of Stable Diffusion", argument="model", wanted=SUPPORTED)
    if any(hasattr(module, "base_layer") for module in attention.modules()):
        raise InputError(
            f"{name} has an adapter (LoRA) in place", argument="model", remedy="unload it, and load it after mount()"
        )
    if attention.to_q.weight.is_meta and hasattr(attention.to_q, "_hf_hook"):
        raise InputError(
            f"{name} is offloaded by enable_sequential_cpu_offload",
            argument="model",
            remedy="remove_all_hooks() of the pipeline, and enable it after mount()",
        )
    channels, heads = attention.query_dim, attention.heads
    if attention.inner_dim != channels or channels % heads:
        raise InputError(
            f"{name} has {channels} channels in {heads} heads of {attention.inner_dim // heads}",
            argument="model",
            wanted="heads that divide the channels",
        )
    return {
        "channels": channels,
        "heads": heads,
        "bias": attention.use_bias,
        "out_bias": attention.to_out[0].bias is not None,
        "dropout": attention.dropout,
    }


def choose(places: Mapping[str, Place], argument: str, choice: str | Sequence[Any]) -> list[str]:
    """The names that a choice of layers stands for, in the order of the places.

    Raises:
        InputError: It names a layer or a level that there is not.
    """
    chosen: set[str] = set()
    for item in [choice] if isinstance(choice, str) else choice:
        if item == "all":
            found = set(places)
        elif isinstance(item, str) and item.startswith("levels="):
            levels = item.removeprefix("levels=").split(",")
            there = sorted({place.level for place in places.values()})
            if unknown := [level for level in levels if level.strip() not in map(str, there)]:
                raise InputError(
                    f"no self-attention at level {unknown[0]}",
                    argument=argument,
                    value=choice,
                    wanted=f"levels among {', '.join(map(str, there))}",
                )
            found = {name for name, place in places.items() if str(place.level) in map(str.strip, levels)}
        else:
            found = {name for name in places if name == item or name.startswith(f"{item}.")}
        if not found and item != "mid_block":  # some distilled U-Nets have none there
            raise InputError(
                f"no self-attention is in {item!r}",
                argument=argument,
                value=choice,
                wanted=f'"all", "levels=0,1" or names such as {next(iter(places))} or mid_block',
            )
        chosen |= found
    return [name for name in places if name in chosen]


def reference(block: Any) -> Tensor:
    """A weight of the block that is never replaced, and not quantised: its device and dtype are the U-Net's."""
    return next(
        weight
        for name, weight in block.named_parameters()
        if not name.startswith("attn1.") and weight.is_floating_point()
    )


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make the module a submodule of this dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in dict(root.named_children()):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)


def written(chunk: Chunk) -> int | dict[str, Any] | None:
    """A chunk as it stands in config.json."""
    return asdict(chunk) if isinstance(chunk, Window) else chunk


def read(chunk: int | Mapping[str, Any] | None) -> Chunk:
    """The chunk that config.json has."""
    return Window(**chunk) if isinstance(chunk, Mapping) else chunk
