"""One measurement of benchmarks/resolution.py, in a process of its own: a model, a size, a pass, its settings.

`python -m benchmarks.resolution_case '{"model": "DiT", "name": "dit-s-2", …}'`, the fields of :class:`Case`, prints the
measurement as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.memory import peak_bytes
from benchmarks.random_model import random_model
from benchmarks.timing import FEWEST, paced
from gspn_dit.arguments import CompileMode
from gspn_dit.diffusion import Batch, create_objective
from gspn_dit.layers.chunks import Chunk
from gspn_dit.layers.windows import Window
from gspn_dit.models import DiT
from gspn_dit.models.compiled_blocks import compile_blocks
from gspn_dit.models.latent_model import LatentModel

LONGEST_WHOLE = 10.0  # seconds of a call; a model that takes longer is put together from its blocks
ATTENTIONS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
MOST_TOKENS = 2**16  # on which attention is timed to choose one; a call on more takes seconds


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        model: The model's name in the tables.
        name, overrides: What `create_model` makes it of.
        step: "forward", or "training": forward, loss, backward and AdamW's step.
        pixels, batch: Side of the square images, and how many.
        dtype: float32 or bfloat16: the weights of a forward, the autocast of a training step.
        compiled: Whether the blocks go through torch.compile.
        device, threads: cpu or cuda; threads of the CPU.
        repeats: The most calls timed.
        compile_mode: How blocks are compiled, if they are.
    """

    model: str
    name: str
    step: str
    pixels: int
    batch: int
    dtype: str
    compiled: bool
    device: str = "cpu"
    threads: int = 2
    repeats: int = 15
    overrides: dict[str, Any] = field(default_factory=dict)
    compile_mode: CompileMode = "default"

    @property
    def settings(self) -> str:
        """The settings in words."""
        mode = "" if self.compile_mode == "default" else f" with {self.compile_mode}"
        return f"{self.dtype}, {f'compiled{mode}' if self.compiled else 'eager'}"

    @property
    def key(self) -> str:
        """The name of the measurement in the results' JSON."""
        return f"{self.model}, {self.step}, {self.pixels} px, {self.settings}"


def measure(case: Case) -> dict[str, Any]:
    """Median seconds of a call and the bytes it adds to those of the weights and the optimiser.

    The model with no block and with one block of each kind is measured first: their sum over the depth is the answer
    where the whole model takes longer than LONGEST_WHOLE or more memory than there is, and is recorded beside it where
    it does not.
    """
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for what is left in float32
    with torch.device(case.device), contextlib.ExitStack() as stack:
        model = model_of(case)
        about = {}  # what else was chosen
        if case.device == "cuda" and isinstance(model, DiT):
            backends = fused_attentions(case, model)
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
            about["attention"] = ", else ".join(backend.name for backend in backends)
        blocks, chunks = model.blocks, model.chunks or (None,) * len(model.blocks)
        kinds = Counter(map(block_kind, blocks, chunks))
        one_of = {block_kind(block, chunk): ([block], (chunk,)) for block, chunk in zip(blocks, chunks, strict=True)}
        parts = {}
        for kind, (part, chunks_of_part) in {"": ([], ()), **one_of}.items():
            model.blocks, model.chunks = nn.ModuleList(part), chunks_of_part
            parts[kind] = timed(case, call_of(case, model), FEWEST)
        model.blocks, model.chunks = blocks, chunks
        ends = parts.pop("")
        sums = {
            what: ends[what] + sum(count * (parts[kind][what] - ends[what]) for kind, count in kinds.items())
            for what in ("seconds", "bytes")
        }
        if case.step == "forward":  # a block's activations go before the next one's come
            sums["bytes"] = max(part["bytes"] for part in parts.values())
        if sums["seconds"] <= LONGEST_WHOLE:
            try:
                whole = timed(case, call_of(case, model), case.repeats)
            except RuntimeError as error:  # most often memory, by whatever library's name; the parts stand
                about["whole_failed"] = str(error).splitlines()[0]
            else:
                return {
                    **whole,
                    "whole": True,
                    "parts": {"ends": ends, **parts},
                    "by_blocks": sums,
                    "depth": len(blocks),
                    **about,
                }
    return {**sums, "whole": False, "parts": {"ends": ends, **parts}, "depth": len(blocks), **about}


def model_of(case: Case) -> LatentModel:
    """The model at random weights."""
    dtype = getattr(torch, case.dtype) if case.step == "forward" else None
    model = random_model(case.name, case.device, dtype=dtype, **case.overrides)
    if isinstance(model, DiT):
        add_positions_in_the_stream_dtype(model)
    if case.compiled:
        compile_blocks(model, case.compile_mode)
    return model


def add_positions_in_the_stream_dtype(model: DiT) -> None:
    """Let a DiT add its positions in the type of its tokens.

    Under autocast its tokens are bfloat16 and its positions float32, and the published model's residual stream is
    float32 from there on, twice the bytes of GSPN-DiT's. DiT is measured at its best.
    """
    positions = model._positions
    model._positions = lambda x: positions(x).to(x.dtype)  # type: ignore[method-assign]


def block_kind(block: nn.Module, chunk: Chunk) -> str:
    """What tells the blocks of a model apart in cost: what a scan runs over, and whether windows are shifted."""
    if isinstance(chunk, Window):
        return f"window {chunk.side}{', shifted' if chunk.shifted else ''}"
    shifted = getattr(getattr(block, "mixer", None), "shifted", False)  # of window attention
    return f"chunk {chunk or 'the map'}{', shifted' if shifted else ''}"


def fused_attentions(case: Case, model: DiT) -> list[SDPBackend]:
    """torch's fused kernels, the fastest first for the case's attention alone, on at most MOST_TOKENS of it.

    Raises :class:`RuntimeError` where there is none: attention that keeps all weights would be measured for it.
    """
    tokens = min((case.pixels // 8 // model.config.patch_size) ** 2, MOST_TOKENS)
    shape = case.batch, tokens, 3, model.config.num_heads, model.config.width // model.config.num_heads
    training, dtype = case.step == "training", getattr(torch, case.dtype)
    qkv = torch.randn(shape, dtype=dtype, device=case.device, requires_grad=training)
    heads = [part.transpose(1, 2) for part in qkv.unbind(2)]  # (B, heads, N, D), as the model has them

    def call() -> None:
        y = F.scaled_dot_product_attention(*heads)
        if training:
            torch.autograd.grad(y, heads, heads[0].detach())

    seconds = {}
    for backend in ATTENTIONS:
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):  # not for this device, shape or torch
            call()
            seconds[backend] = timed(case, call, FEWEST)["seconds"]
    if not seconds:
        raise RuntimeError(f"none of {', '.join(backend.name for backend in ATTENTIONS)} takes {dtype} {shape}")
    return sorted(seconds, key=seconds.get)


def call_of(case: Case, model: LatentModel) -> Callable[[], None]:
    """A forward or a training step on random latents, times and labels."""
    side = case.pixels // 8
    latents, noise = (torch.randn(case.batch, model.in_channels, side, side) for _ in range(2))
    u, condition = torch.rand(case.batch), {"class_labels": torch.randint(model.null_class, (case.batch,))}
    dtype = getattr(torch, case.dtype)
    if case.step == "forward":
        latents, timesteps = latents.to(dtype), 1000 * u

        @torch.no_grad()
        def call() -> None:
            model(latents, timesteps, **condition)

        return call
    objective, batch = create_objective("flow"), Batch(latents=latents, noise=noise, u=u, condition=condition)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(case.device, dtype, enabled=dtype != torch.float32):
            loss: Tensor = objective.loss(model, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(case: Case, call: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Seconds of a call after the first two, as :func:`paced` has them, and the bytes that it adds at its peak."""
    call()  # compiles
    added = peak_bytes(case.device, call)
    return {**paced(case.device, call, repeats), "bytes": added}


if __name__ == "__main__":
    try:
        result = measure(Case(**json.loads(sys.argv[1])))
    except torch.OutOfMemoryError:
        result = {"error": "out of memory"}
    print(json.dumps(result))
