"""What a UNet of diffusers needs less memory with at large sizes: the same numbers, from smaller or fewer tensors.

Each is a block around the UNet's calls, without gradients, that leaves the UNet as it was:

- feed-forwards take the tokens in slices (their hidden layer is eight times as wide as a token);
- activations between a norm and a convolution overwrite the norm's output;
- skips wait on the CPU until the layer that reads them.

Guidance in slices is no block but two calls in place of one: :func:`gspn_dit.inference.unet_sampling.draw_latents`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import silu

from gspn_dit.devices import memory_of
from gspn_dit.errors import InputError, warn
from gspn_dit.storage.files import in_bytes

SLICE_TOKENS = 2**15  # of a feed-forward; more would be no faster
_SLICED_FROM = 2**16  # latents of an image: 2048 × 2048 pixels of Stable Diffusion
_SKIPS_AWAY_FROM = 2**20  # 8192 × 8192 pixels: their way to the CPU and back takes time
_LARGEST = 2**31 - 1  # elements of a tensor, above which some CUDA kernels refuse or are wrong


@dataclass(frozen=True)
class Saving:
    """What is done to need less memory.

    Args:
        slices: Guidance in slices, feed-forwards in slices, activations in place.
        skips_on_cpu: Skips wait on the CPU.
    """

    slices: bool
    skips_on_cpu: bool


def choose_saving(memory: Literal["auto", "on", "off"], latent_size: tuple[int, int]) -> Saving:
    """What is done at a size of latents (h, w): all, nothing, or what is worth its time at that size."""
    latents = latent_size[0] * latent_size[1]
    if memory == "auto":
        return Saving(latents >= _SLICED_FROM, latents >= _SKIPS_AWAY_FROM)
    return Saving(memory == "on", memory == "on")


def check_unet_memory(unet: UNet2DConditionModel, shape: tuple[int, int, int], device: torch.device) -> None:
    """Raise :class:`InputError` for latents that are more than a device could ever have memory for.

    Warns of what has tensors of more elements than CUDA's kernels are made for. The widest are at the latents' size:
    what the last block on the way up makes of its input and of a skip, 960 channels in SD 1.x and XL.

    Args:
        unet: The model.
        shape: Images in a call, with those of guidance if it is not in slices, and height and width of the latents.
        device: Where it is to run.
    """
    elements = max(block.in_channels for block in unet.up_blocks[-1].resnets) * math.prod(shape)
    needed, memory = 2 * elements * unet.dtype.itemsize, memory_of(device)  # that tensor, and the norm of it
    if needed > memory:
        raise InputError(f"over {in_bytes(needed)}, and the memory of {device} is {in_bytes(memory)}")
    if device.type == "cuda" and elements > _LARGEST:
        warn(
            f"a tensor of {elements / 2**30:.1f}·2³⁰ elements at {shape[0]}×{shape[2]}×{shape[1]} latents; CUDA's "
            "kernels are made for 2·2³⁰, and may stop there"
        )


@contextmanager
def saving_memory(unet: UNet2DConditionModel, saving: Saving) -> Iterator[None]:
    """In the block, calls of the UNet save memory; but for guidance, which its caller slices."""
    with ExitStack() as stack:
        if saving.slices:
            stack.enter_context(feed_forwards_in_slices(unet))
            stack.enter_context(activations_in_place(unet))
        if saving.skips_on_cpu:
            stack.enter_context(skips_kept(unet, to_cpu, from_cpu))
        yield


@contextmanager
def feed_forwards_in_slices(unet: nn.Module) -> Iterator[None]:
    """In the block, feed-forwards of transformer blocks take SLICE_TOKENS tokens at a time."""

    def sliced(whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
            tokens = hidden_states.flatten(0, -2)
            if len(tokens) <= SLICE_TOKENS:
                return whole(hidden_states, *arguments, **options)
            parts = tokens.split(SLICE_TOKENS)
            first = whole(parts[0], *arguments, **options)
            out = first.new_empty(len(tokens), first.shape[-1])
            out[: len(first)] = first
            for start, part in enumerate(parts[1:], 1):
                out[start * SLICE_TOKENS :][: len(part)] = whole(part, *arguments, **options)
            return out.unflatten(0, hidden_states.shape[:-1])

        return forward

    with _forwards(unet, FeedForward, lambda layer: layer, sliced):
        yield


@contextmanager
def activations_in_place(unet: nn.Module) -> Iterator[None]:
    """In the block, the activations after ResNet blocks' norms overwrite their inputs, which nothing else reads."""

    def overwriting(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: silu(x, inplace=x.ndim == 4)  # the same module serves time embeddings, which others read

    def activation(block: ResnetBlock2D) -> nn.Module | None:
        return block.nonlinearity if isinstance(block.nonlinearity, nn.SiLU) else None

    with _forwards(unet, ResnetBlock2D, activation, overwriting):
        yield


@contextmanager
def skips_kept(
    unet: UNet2DConditionModel, put: Callable[[Tensor], Tensor], get: Callable[[Tensor, torch.device], Tensor]
) -> Iterator[None]:
    """In the block, the tensors that skip from the UNet's way down to its way up are kept elsewhere in between.

    Each is put away when the block of layers that made it ends, and got when the layer that reads it begins.

    Args:
        unet: The model.
        put: A tensor (B, C, h, w) to what is kept of it, which has its shape.
        get: What is kept, and the device that it is wanted on, to the tensor.
    """
    device = torch.device("cpu")

    def after_first(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        nonlocal device
        device = output.device
        return put(output)

    def before_down(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, options | {"hidden_states": get(options["hidden_states"], device)}

    def after_down(_: nn.Module, inputs: tuple, output: tuple[Tensor, tuple[Tensor, ...]]) -> tuple:
        hidden_states, skips = output
        return hidden_states, tuple(map(put, skips))

    def before_up(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kept = _Kept(options["res_hidden_states_tuple"], lambda skip: get(skip, device))
        return arguments, options | {"res_hidden_states_tuple": kept}

    with ExitStack() as stack:
        handles = [
            unet.conv_in.register_forward_hook(after_first),
            unet.down_blocks[0].register_forward_pre_hook(before_down, with_kwargs=True),
            *(block.register_forward_hook(after_down) for block in unet.down_blocks),
            *(block.register_forward_pre_hook(before_up, with_kwargs=True) for block in unet.up_blocks),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        yield


class _Kept:
    """The skips of a block on the way up as it takes them: the last, and those before it."""

    def __init__(self, kept: tuple[Tensor, ...], get: Callable[[Tensor], Tensor]) -> None:
        self.kept, self.get = kept, get

    def __getitem__(self, which: int | slice) -> Tensor | _Kept:
        return _Kept(self.kept[which], self.get) if isinstance(which, slice) else self.get(self.kept[which])


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, page-locked where it comes from a GPU; on the CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)  # what is read of it waits on the same stream


def from_cpu(tensor: Tensor, device: torch.device) -> Tensor:
    """What :func:`to_cpu` gave, on the device again."""
    return tensor.to(device, non_blocking=True)


@contextmanager
def _forwards(
    unet: nn.Module,
    kind: type[nn.Module],
    part: Callable[[Any], nn.Module | None],
    changed: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
) -> Iterator[None]:
    """In the block, a part of each module of a kind has another forward, made of its own."""
    parts = [each for module in unet.modules() if isinstance(module, kind) and (each := part(module)) is not None]
    before = {module: vars(module).get("forward") for module in parts}
    try:
        for module in before:
            module.forward = changed(module.forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
