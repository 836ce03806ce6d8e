"""What `benchmarks.quality` can change in a gspn-dit beyond its options: `gspn-dit+variant=NAME`, functions of a model.

A choice that lost, or that nobody should have to make, is tried here and is no option of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.layers.linear import linear
from gspn_dit.layers.mixers import NUM_DIRECTIONS, GSPNMixer
from gspn_dit.layers.modulation import FinalLayer
from gspn_dit.models import GSPNDiT
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.ops import propagate


def each_mixer(change: Callable[[GSPNMixer, int], None]) -> Callable[[GSPNDiT], None]:
    """A variant that changes every block's mixer, given with the width."""

    def apply(model: GSPNDiT) -> None:
        for block in model.blocks:
            change(block.mixer, model.config.width)

    return apply


def gated(mixer: GSPNMixer, width: int) -> None:
    """A branch beside the scan, y = proj(norm(mix(v)) ⊙ SiLU(W_g x)): C² more."""
    mixer.gate = linear(width, width)

    def forward(self: GSPNMixer, x: Tensor, chunk: int | None = None) -> Tensor:
        value = self.conv(self.value(x))
        return self.proj(self.join(self.mix(value, chunk), value) * F.silu(self.gate(x)))

    mixer.forward = MethodType(forward, mixer)


def norm_free(mixer: GSPNMixer, width: int) -> None:
    """No norm after the scan."""
    mixer.norm = lambda y: y


def scan(
    mixer: GSPNMixer, value: Tensor, chunk: int | None, gates: Tensor, lam: Tensor, out: Tensor | None = None
) -> Tensor:
    """The mixer's scans with these gates and λ, and u where it is given."""
    decay, scale = mixer.channel_factors(torch.float32)
    return propagate(value, gates, lam, out, decay=decay, scale=scale, chunk=chunk)


def lam_through(activation: Callable[[Tensor], Tensor], start: float) -> Callable[[GSPNDiT], None]:
    """λ through an activation, which gives 1/4 at the start."""

    def change(mixer: GSPNMixer, width: int) -> None:
        with torch.no_grad():
            mixer.head[1].bias.view(mixer.num_groups, NUM_DIRECTIONS * 4)[:, NUM_DIRECTIONS * 3 :] = start

        def mix(self: GSPNMixer, value: Tensor, chunk: int | None = None) -> Tensor:
            gates, lam = self.token_gates(value)
            return scan(self, value, chunk, gates, activation(lam))

        mixer.mix = MethodType(mix, mixer)

    return each_mixer(change)


def output_gates(mixer: GSPNMixer, width: int) -> None:
    """Gates u of every group and direction at every site, where the directions are summed: 1 at the start."""
    mixer.out_head = linear(mixer.head[0].out_features, mixer.num_groups * NUM_DIRECTIONS)
    nn.init.normal_(mixer.out_head.weight, std=0.02)
    nn.init.ones_(mixer.out_head.bias)

    def mix(self: GSPNMixer, value: Tensor, chunk: int | None = None) -> Tensor:
        gates, lam = self.token_gates(value)
        out = self.out_head(self.head[0](value)).to(value.dtype).unflatten(-1, (NUM_DIRECTIONS, self.num_groups))
        return scan(self, value, chunk, gates, lam, out)

    mixer.mix = MethodType(mix, mixer)


def equal_scans(mixer: GSPNMixer, width: int) -> None:
    """The four scans are added up as they are: s = 1."""
    mixer.scale = nn.Parameter(torch.ones_like(mixer.scale), requires_grad=False)


def scans_alone(mixer: GSPNMixer, width: int) -> None:
    """No direct path beside the norm."""
    del mixer.direct
    mixer.join = MethodType(lambda self, mixed, value: self.norm(mixed).to(value.dtype), mixer)


def direct_conv(mixer: GSPNMixer, width: int) -> None:
    """A 7 × 7 convolution of the value for d ⊙ v; it starts as a random one beside the value itself."""
    del mixer.direct
    mixer.direct_conv = DepthwiseConv(width, 7)
    with torch.no_grad():
        mixer.direct_conv.weight.mul_(0.5)[:, :, 3, 3] += 1

    def join(self: GSPNMixer, mixed: Tensor, value: Tensor) -> Tensor:
        return self.norm(mixed).to(value.dtype) + self.direct_conv(value)

    mixer.join = MethodType(join, mixer)


def group_factors(mixer: GSPNMixer, width: int) -> None:
    """f and s are numbers a group and direction; half-lives of 2 … 64 lines are spread over the groups.

    To be named before other variants of f and s, which change what it gives.
    """
    if "channel_factors" in vars(mixer):
        raise InputError("variant='group-factors': name it before the other variants of f and s")
    half_lives = 2 ** torch.linspace(1, 6, mixer.num_groups)
    mixer.log_rate = nn.Parameter((math.log(2) / half_lives).log().repeat(NUM_DIRECTIONS, 1))
    mixer.scale = nn.Parameter(torch.randn(NUM_DIRECTIONS, mixer.num_groups))

    def channel_factors(self: GSPNMixer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        factors = (-self.log_rate.to(dtype).exp()).exp(), self.scale.to(dtype)
        return tuple(factor.repeat_interleave(width // self.num_groups, 1) for factor in factors)

    mixer.channel_factors = MethodType(channel_factors, mixer)


def one_direction(mixer: GSPNMixer, width: int) -> None:
    """A channel is scanned in one direction, not in all four: those of the k-th quarter in the k-th."""
    quarter = torch.arange(width) * NUM_DIRECTIONS // width
    mixer.register_buffer("own", (quarter == torch.arange(NUM_DIRECTIONS)[:, None]).float(), persistent=False)
    factors = mixer.channel_factors.__func__

    def channel_factors(self: GSPNMixer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        decay, scale = factors(self, dtype)
        return decay, scale * self.own

    mixer.channel_factors = MethodType(channel_factors, mixer)


def remembering(mixer: GSPNMixer, width: int) -> None:
    """Lines that forget nothing: f = 1."""
    mixer.log_rate.requires_grad_(False)
    factors = mixer.channel_factors.__func__
    mixer.channel_factors = MethodType(lambda self, dtype: (None, factors(self, dtype)[1]), mixer)


def half_lives(shortest: float, longest: float) -> Callable[[GSPNDiT], None]:
    """Lines that start with other half-lives than 2 … 64."""

    def change(mixer: GSPNMixer, width: int) -> None:
        # spread over the groups where f is one's, else in each over its channels
        numbers, groups = mixer.log_rate.shape[1], mixer.num_groups
        steps = groups if numbers == groups else numbers // groups
        lives = 2 ** torch.linspace(math.log2(shortest), math.log2(longest), steps).repeat(numbers // steps)
        with torch.no_grad():
            mixer.log_rate.copy_((math.log(2) / lives).log())

    return each_mixer(change)


def gates_from_input(mixer: GSPNMixer, width: int) -> None:
    """The head reads the block's input, as attention's queries do, not the convolved value."""

    def forward(self: GSPNMixer, x: Tensor, chunk: int | None = None) -> Tensor:
        value = self.conv(self.value(x))
        gates, lam = self.token_gates(x.to(value.dtype))
        return self.proj(self.join(scan(self, value, chunk, gates, lam), value))

    mixer.forward = MethodType(forward, mixer)


def wide_head(mixer: GSPNMixer, width: int) -> None:
    """A head of rank C / 4, four times the default's."""
    start = mixer.head[1].bias
    mixer.head = nn.Sequential(linear(width, width // 4, bias=False), linear(width // 4, len(start)))
    nn.init.normal_(mixer.head[1].weight, std=0.02)
    with torch.no_grad():
        mixer.head[1].bias.copy_(start)


def lines_aside(logit: float) -> Callable[[GSPNDiT], None]:
    """Lines that start alike in all groups, with this logit for both neighbours aside and 0 for the one before."""

    def change(mixer: GSPNMixer, width: int) -> None:
        with torch.no_grad():
            logits = mixer.head[1].bias.view(mixer.num_groups, NUM_DIRECTIONS * 4)[:, : NUM_DIRECTIONS * 3]
            logits.copy_(torch.tensor([logit, 0.0, logit]).repeat(NUM_DIRECTIONS))

    return each_mixer(change)


def fan(mixer: GSPNMixer, width: int) -> None:
    """Lines that start at three angles: group g leans to neighbour g mod 3."""
    with torch.no_grad():
        logits = mixer.head[1].bias.view(mixer.num_groups, NUM_DIRECTIONS * 4)[:, : NUM_DIRECTIONS * 3]
        logits = logits.view(mixer.num_groups, NUM_DIRECTIONS, 3)
        logits.fill_(-3.0)
        for group in range(mixer.num_groups):
            logits[group, :, group % 3] = 0.0


def block_modulation(model: GSPNDiT) -> None:
    """DiT's 6C² of modulation in every block beside the shared one, in place of 1.5C²."""
    width = model.config.width
    model.block_condition = nn.SiLU()
    for block in model.blocks:
        block.modulation[0] = linear(width, 6 * width, zero=True)


def shared_modulation(model: GSPNDiT) -> None:
    """Nothing of a block's own but an offset (as PixArt-alpha's adaLN-single, arXiv 2310.00426)."""
    for block in model.blocks:
        block.modulation[0].weight.requires_grad_(False)


def long_skips(model: GSPNDiT) -> None:
    """U-ViT's and the GSPN paper's: block depth-1-i takes Linear(2C→C) of its input and block i's output."""
    width, depth = model.config.width, model.config.depth
    model.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))
    for skip in model.skips:  # starts as the identity on the straight path
        nn.init.zeros_(skip.bias)
        with torch.no_grad():
            skip.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], 1))

    def forward(self: GSPNDiT, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        x, condition = self.embed(latents, timesteps, class_labels)
        modulation, block_condition = self.modulation(condition), self.block_condition(condition)
        kept = []
        for i, block in enumerate(self.blocks):
            mirror = i - (depth - depth // 2)
            if mirror >= 0:
                x = self.skips[mirror](torch.cat([x, kept[depth // 2 - 1 - mirror]], -1))
            x = self.run(block, x, modulation, block_condition, self.chunks[i])
            if i < depth // 2:
                kept.append(x)
        return self.unpatchify(self.final_layer(x, modulation))

    model.forward = MethodType(forward, model)


def labels_of(std: float) -> Callable[[LatentModel], None]:
    """Labels' vectors that start at another scale: DiT's is 0.02, gspn-dit's 1."""

    def change(model: LatentModel) -> None:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=std)

    return change


def loud_times(model: GSPNDiT) -> None:
    """Times' vectors that start at ten times DiT's scale."""
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.2)


def unit_times(model: GSPNDiT) -> None:
    """Times' vectors that start at unit scale: 128 waves of square sum, and 0.356 is the mean of SiLU(z)²."""
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=128**-0.5)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=(0.356 * model.config.width) ** -0.5)


def half_rank(model: GSPNDiT) -> None:
    """Modulation of rank C / 2 in every block: twice the default's 1.5C² parameters."""
    width = model.config.width
    model.block_condition[1] = linear(width, width // 2)
    for block in model.blocks:
        block.modulation[0] = linear(width // 2, 6 * width, zero=True)


def final_modulation(model: GSPNDiT) -> None:
    """DiT's final layer, with a modulation of its own, 2C², in place of the shared one's first two parts."""
    model.final_layer = FinalLayer(model.config.width, model.patch_values)

    def forward(self: GSPNDiT, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        x, condition = self.embed(latents, timesteps, class_labels)
        modulation, block_condition = self.modulation(condition), self.block_condition(condition)
        for block, chunk in zip(self.blocks, self.chunks, strict=True):
            x = self.run(block, x, modulation, block_condition, chunk)
        return self.unpatchify(self.final_layer(x, condition))

    model.forward = MethodType(forward, model)


def float_stream(model: GSPNDiT) -> None:
    """Under autocast, x between blocks in float32, as dit's and gspn's is, whose float32 embeddings are added to it."""
    embed = type(model).embed

    def in_float32(self: GSPNDiT, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, condition = embed(self, *inputs)
        return x.float(), condition

    model.embed = MethodType(in_float32, model)


class SwiGLU(nn.Module):
    """A feed-forward with gated hidden channels, W₂(SiLU(W₁x) ⊙ W₃x) (arXiv 2002.05202): 3C times the hidden width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = linear(width, 2 * hidden)
        self.fc2 = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def swiglu(model: GSPNDiT) -> None:
    """SwiGLU with two thirds of the hidden channels: as many multiplications."""
    for block in model.blocks:
        block.mlp = SwiGLU(model.config.width, 2 * block.mlp.fc2.in_features // 3)


def mlp_conv(model: GSPNDiT) -> None:
    """A depthwise 3×3 convolution on the feed-forward's hidden map (SANA's Mix-FFN, arXiv 2410.10629)."""
    for block in model.blocks:
        block.mlp.act = nn.Sequential(DepthwiseConv(block.mlp.fc2.in_features, 3), block.mlp.act)


def gelu(model: GSPNDiT) -> None:
    """DiT's tanh-approximated GELU for the squared ReLU."""
    for block in model.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def post_norm(model: GSPNDiT) -> None:
    """A norm on what each half adds, beside the one on what it reads."""
    width = model.config.width
    for block in model.blocks:
        block.mixer.proj = nn.Sequential(block.mixer.proj, nn.RMSNorm(width, eps=1e-6))
        block.mlp.fc2 = nn.Sequential(block.mlp.fc2, nn.RMSNorm(width, eps=1e-6))


VARIANTS: dict[str, Callable[[LatentModel], None]] = {
    "gated": each_mixer(gated),
    "swiglu": swiglu,
    "norm-free": each_mixer(norm_free),
    "lam-sigmoid": lam_through(torch.sigmoid, -1.0986),
    "lam-softplus": lam_through(F.softplus, -1.2587),
    "lam-constant": lam_through(lambda lam: torch.full_like(lam, 0.25), 0.25),
    "output-gates": each_mixer(output_gates),
    "equal-scans": each_mixer(equal_scans),
    "scans-alone": each_mixer(scans_alone),
    "direct-conv": each_mixer(direct_conv),
    "one-direction": each_mixer(one_direction),
    "half-lives-4-64": half_lives(4.0, 64.0),
    "half-lives-2-32": half_lives(2.0, 32.0),
    "group-factors": each_mixer(group_factors),
    "remembering": each_mixer(remembering),
    "gates-from-input": each_mixer(gates_from_input),
    "wide-head": each_mixer(wide_head),
    "spreading": lines_aside(0.0),
    "straight-84": lines_aside(-3.0),
    "straight-97": lines_aside(-5.0),
    "fan": each_mixer(fan),
    "block-modulation": block_modulation,
    "shared-modulation": shared_modulation,
    "long-skips": long_skips,
    "mlp-conv": mlp_conv,
    "gelu": gelu,
    "loud-times": loud_times,
    "unit-times": unit_times,
    "half-rank": half_rank,
    "float-stream": float_stream,
    "final-modulation": final_modulation,
    "post-norm": post_norm,
    "quiet-labels": labels_of(0.02),
    "unit-labels": labels_of(1.0),
}
OF_ANY_FAMILY = ("quiet-labels", "unit-labels")  # the others change what only a gspn-dit has
