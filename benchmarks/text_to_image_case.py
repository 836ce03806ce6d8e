"""What benchmarks/text_to_image.py measures: a UNet, or one of its layers, with each mixer in the place of attention.

Two stand-ins bound what a mixer can reach: the attention's projections alone, as if what is between tokens were free,
and nothing at all, as if there were no attention.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.commands import TextToImageOptions
from benchmarks.memory import peak_bytes
from benchmarks.stable_diffusion import FACTOR, random_inputs, random_unet
from benchmarks.timing import FEWEST, paced
from gspn_dit import replace_self_attention
from gspn_dit.inference.unet_memory import choose_saving, saving_memory
from gspn_dit.layers.windows import Window
from gspn_dit.models.attention_replacement import attention_places
from gspn_dit.models.macs import macs_of
from gspn_dit.models.replaced_attention import REPLACEMENTS

PROJECTIONS, NOTHING, SDPA = "projections alone", "no attention", "sdpa"
BACKENDS = {  # of softmax attention on a GPU; the second of each where the first does not take the shape
    SDPA: [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "sdpa-cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
}
GUIDED = 2  # images in a call with guidance
LONGEST_WHOLE, LONGEST_REPEATED = 30.0, 10.0  # seconds of a call that is made at all, and of one that is made again
SECONDS_OF_REPEATS = 3.0  # of one mixer at one size
RATE = {"cuda": 1.5e14, "cpu": 2e10}  # multiply-accumulates a second, to guess what takes too long to begin
QUERY_SHARE = 16  # the part of the queries on which attention is timed where a whole call would take too long


class Shape(NamedTuple):
    """What a self-attention is given: images, tokens, and channels in heads."""

    images: int
    tokens: int
    channels: int
    heads: int


class Without(nn.Module):
    """In the place of a self-attention: its projections alone, or nothing; it notes the shapes that come.

    Args:
        attention: Whose place it is.
        projects: Whether it has the projections.
        shapes: Where shapes are noted.
    """

    def __init__(self, attention: Attention, projects: bool, shapes: Counter[Shape]) -> None:
        super().__init__()
        self.parts = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])  # not as modules of its own
        self.heads, self.projects, self.shapes = attention.heads, projects, shapes

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        self.shapes[Shape(*hidden_states.shape, self.heads)] += 1
        if not self.projects:
            return hidden_states
        to_q, to_k, to_v, to_out = self.parts
        to_q(hidden_states), to_k(hidden_states)
        return to_out(to_v(hidden_states))


class RandomUNet:
    """One of Stable Diffusion's UNets at random weights.

    Args:
        name: One of benchmarks.stable_diffusion.UNETS.
        options: The benchmark's.
        device: Where; on the meta device it is for counting.
    """

    def __init__(self, name: str, options: TextToImageOptions, device: str) -> None:
        self.unet, self.options = random_unet(name, device, getattr(torch, options.dtype)), options
        self.shapes: Counter[Shape] = Counter()
        self.places = attention_places(self.unet)
        mixers = [mixer for mixer in options.mixers if mixer in REPLACEMENTS]
        self.replacements = {mixer: replace_self_attention(self.unet, mixer, seed=0) for mixer in mixers}

    @contextmanager
    def standing(self, variant: str) -> Iterator[None]:
        """In the block, a mixer or a stand-in takes the place of every self-attention."""
        if variant in self.replacements:
            replacement = self.replacements[variant].mount(self.unet)
            try:
                yield
            finally:
                replacement.unmount()
        elif variant in (PROJECTIONS, NOTHING):
            for place in self.places.values():
                place.block.attn1 = Without(place.attention, variant == PROJECTIONS, self.shapes)
            try:
                yield
            finally:
                for place in self.places.values():
                    place.block.attn1 = place.attention
        else:
            with backend_of(variant, self.options.device):
                yield

    @contextmanager
    def ready(self, size: tuple[int, int]) -> Iterator[Callable[[], None]]:
        """In the block, a call for one image with guidance, in slices where `memory` says so."""
        saving = choose_saving(self.options.memory, (size[0] // FACTOR, size[1] // FACTOR))
        inputs = random_inputs(self.unet, size, 1 if saving.slices else GUIDED)

        def call() -> None:
            for _ in range(GUIDED if saving.slices else 1):
                self.unet(**inputs)

        with saving_memory(self.unet, saving):
            yield call


class RandomLayer:
    """One self-attention of SD-XL's first level with attention: 640 channels, 10 heads, a token for 16 × 16 pixels.

    Args:
        name: Of it in the tables.
        options: The benchmark's.
        device: As :class:`RandomUNet`'s.
    """

    channels, heads, pixels = 640, 10, 16

    def __init__(self, name: str, options: TextToImageOptions, device: str) -> None:
        self.device, self.dtype, self.options = device, getattr(torch, options.dtype), options
        self.shapes: Counter[Shape] = Counter()
        width = self.channels // self.heads
        with torch.device(device):
            attention = Attention(self.channels, heads=self.heads, dim_head=width).to(self.dtype)
            self.layers: dict[str, nn.Module] = dict.fromkeys(BACKENDS, attention)
            self.layers[PROJECTIONS] = Without(attention, True, self.shapes)
            self.layers[NOTHING] = Without(attention, False, self.shapes)
            for mixer in options.mixers:
                if mixer in REPLACEMENTS:
                    window = Window(32) if REPLACEMENTS[mixer].sees_chunk else None
                    self.layers[mixer] = REPLACEMENTS[mixer](self.channels, self.heads, window).to(self.dtype)
        self.current = attention

    @contextmanager
    def standing(self, variant: str) -> Iterator[None]:
        """As :meth:`RandomUNet.standing`."""
        self.current = self.layers[variant]
        with backend_of(variant, self.options.device):
            yield

    @contextmanager
    def ready(self, size: tuple[int, int]) -> Iterator[Callable[[], None]]:
        """In the block, a call for one image with guidance."""
        map_size = size[0] // self.pixels, size[1] // self.pixels
        tokens = torch.randn(
            GUIDED, map_size[0] * map_size[1], self.channels, dtype=self.dtype, device=torch.device(self.device)
        )
        for layer in self.layers.values():
            layer.size = map_size
        yield lambda: self.current(tokens)


LAYER = "SD-XL layer"


def subject(name: str, options: TextToImageOptions, device: str) -> RandomUNet | RandomLayer:
    """What is measured, by its name in the options."""
    return (RandomLayer if name == LAYER else RandomUNet)(name, options, device)


@contextmanager
def backend_of(variant: str, device: str) -> Iterator[None]:
    """In the block, softmax attention is computed as the variant says, if it does, on a GPU."""
    with ExitStack() as stack:
        if device == "cuda" and variant in BACKENDS:
            stack.enter_context(sdpa_kernel(BACKENDS[variant], set_priority=True))
        yield


def counted(on_meta: RandomUNet | RandomLayer, size: tuple[int, int]) -> dict[str, int]:
    """Multiply-accumulates of a call for one image without guidance: with attention, and with each stand-in.

    Counted is the call without attention; an attention of N tokens with C channels has 4NC² in its projections, and
    2N²C in QKᵀ and in the weights times V.
    """
    on_meta.shapes.clear()
    with on_meta.ready(size) as call, on_meta.standing(NOTHING):
        nothing = macs_of(call)
    of_each = [(count * shape.images, shape.tokens, shape.channels) for shape, count in on_meta.shapes.items()]
    projections = nothing + sum(count * 4 * tokens * channels**2 for count, tokens, channels in of_each)
    whole = projections + sum(count * 2 * tokens**2 * channels for count, tokens, channels in of_each)
    return {SDPA: whole // GUIDED, PROJECTIONS: projections // GUIDED, NOTHING: nothing // GUIDED}


@torch.no_grad()
def measure(
    subject: RandomUNet | RandomLayer,
    size: tuple[int, int],
    variants: Sequence[str],
    macs: int,
    done: Callable[[str, dict[str, Any]], None],
    passed: Callable[[], bool],
) -> None:
    """Seconds and bytes of each variant's call, in turns.

    Each is called once for its peak memory. Then they are timed one after the other, again and again, until each has
    its repeats or SECONDS_OF_REPEATS; a first call of more than LONGEST_REPEATED is the figure. Softmax attention that
    would take more than LONGEST_WHOLE is put together from parts (:func:`by_parts`).

    Args:
        subject: What is called.
        size: Height and width of the image in pixels.
        variants: Mixers and stand-ins.
        macs: Multiply-accumulates of an image with softmax attention.
        done: Told each variant's figures, also of those that are measured further.
        passed: Whether the time is up, and no call is to begin.
    """
    device = subject.options.device
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    whole = GUIDED * macs / RATE[device] <= LONGEST_WHOLE
    with subject.ready(size) as call:
        for variant in variants:
            if passed():
                return
            if variant in BACKENDS and not whole:
                continue
            with subject.standing(variant):
                found[variant], times[variant] = first_call(device, call)
            done(variant, found[variant])
        for _ in range(subject.options.repeats):
            for variant, seconds in times.items():
                enough = sum(seconds[1:]) >= SECONDS_OF_REPEATS or seconds[0] >= LONGEST_REPEATED
                if "error" in found[variant] or enough or passed():
                    continue
                with subject.standing(variant):
                    seconds.append(seconds_of(device, call))
                timed = seconds[1:]
                figures = {"seconds": statistics.median(timed), "least": min(timed), "most": max(timed)}
                found[variant].update(figures, repeats=len(timed))
                done(variant, found[variant])
        for variant in variants:
            if variant in BACKENDS and not whole and not passed():
                done(variant, by_parts(subject, variant, call))


def first_call(device: str, call: Callable[[], object]) -> tuple[dict[str, Any], list[float]]:
    """Figures of a first call, and its seconds; what went wrong is a figure too."""
    seconds: list[float] = []
    try:
        added = peak_bytes(device, lambda: seconds.append(seconds_of(device, call)))
    except RuntimeError as error:  # memory ran out, or a kernel refuses the size
        failed = failure(error)
    else:
        return {"seconds": seconds[0], "least": seconds[0], "most": seconds[0], "repeats": 1, "bytes": added}, seconds
    if device == "cuda":
        torch.cuda.empty_cache()
    return failed, [0.0]


def failure(error: RuntimeError) -> dict[str, Any]:
    """What stands in the place of figures."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"error": "out of memory"}
    return {"error": (str(error).splitlines() or [type(error).__name__])[0][:100]}


def seconds_of(device: str, call: Callable[[], object]) -> float:
    """Wall seconds of a call, waited for."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_parts(subject: RandomUNet | RandomLayer, variant: str, call: Callable[[], None]) -> dict[str, Any]:
    """What a call with softmax attention would take.

    It is the call with the projections alone, and for each self-attention the time of a share of its queries over that
    share.
    """
    device, dtype = subject.options.device, getattr(torch, subject.options.dtype)
    subject.shapes.clear()
    with subject.standing(PROJECTIONS):
        seconds = seconds_of(device, call)
    shapes = dict(subject.shapes)
    try:
        with backend_of(variant, device):
            for shape, count in shapes.items():
                width, part = shape.channels // shape.heads, max(shape.tokens // QUERY_SHARE, 1)
                query, key, value = (
                    torch.randn(shape.images, n, shape.heads, width, dtype=dtype, device=device).transpose(1, 2)
                    for n in (part, shape.tokens, shape.tokens)
                )

                def attend(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:
                    return scaled_dot_product_attention(q, k, v)

                attend()
                seconds += count * shape.tokens / part * paced(device, attend, FEWEST)["seconds"]
    except RuntimeError as error:
        return {**failure(error), "whole": False}
    return {"seconds": seconds, "repeats": 0, "whole": False}
