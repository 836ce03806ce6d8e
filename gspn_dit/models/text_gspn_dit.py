"""gspn-dit that draws from text: line scans among a map's tokens, cross-attention from them to a text's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.chunks import Chunk, as_windows, chunk_by_layer
from gspn_dit.layers.cross_attention import CrossAttention
from gspn_dit.layers.embeddings import TimestepEmbedding
from gspn_dit.layers.feed_forward import FeedForward, SquaredReLU
from gspn_dit.layers.fused import PASSES_WITH_TEXT, gated_residual, gated_residual_norm, modulated_norm, modulations
from gspn_dit.layers.linear import linear
from gspn_dit.layers.mixers import MIXERS, Mixer, Projections
from gspn_dit.layers.norm import ChannelNorm
from gspn_dit.models.gspn_dit import SIZES as OF_CLASSES
from gspn_dit.models.gspn_dit import SharedFinalLayer
from gspn_dit.models.latent_model import LatentModel, check_one_each
from gspn_dit.models.registry import register_model
from gspn_dit.models.saved_model import require_count
from gspn_dit.text.tokens import token_mask

NUM_VECTORS = sum(PASSES_WITH_TEXT)  # of a block's modulation
TEXT_SIZES = {
    "ti": {"text_width": 128, "text_depth": 2},
    "s": {"text_width": 256, "text_depth": 4},
    "b": {"text_width": 512, "text_depth": 6},
    "l": {"text_width": 768, "text_depth": 8},
    "xl": {"text_width": 768, "text_depth": 12},
}
SIZES = {size: numbers | TEXT_SIZES[size] for size, numbers in OF_CLASSES.items()}


@register_model("gspn-t2i", SIZES)
class TextGSPNDiT(LatentModel):
    """gspn-dit's blocks with cross-attention to a text between mixer and feed-forward; any map at any time.

    Called as model(latents (B, in_channels, h, w), timesteps (B,) in 0 … 1000, text, chunk_scale=1.0) →
    (B, out_channels, h, w), for any h and w divisible by the patch. The text is `input_ids` (B, L) for a model that has
    a text encoder of its own, which trains with it. For one without it is what a frozen encoder makes:
    `encoder_hidden_states` (B, L, text_width) and `encoder_attention_mask` (B, L), true at the text's own tokens.

    Every block attends to all tokens of the text. Shift, scale and gate of its three parts come from the time and the
    mean of the text's tokens, as gspn-dit's from time and class.

    Args:
        width, depth, num_groups, mlp_ratio, conv_kernel, chunk, global_layers, windows, mixer: As
            :class:`~gspn_dit.models.gspn_dit.GSPNDiT`.
        sample_size, patch_size, in_channels, out_channels: As :class:`~gspn_dit.models.latent_model.LatentModel`.
        vocab_size: Tokens of the model's own text encoder; None for a model that takes hidden states. CLIP's is 49408.
        text_width: Channels of the text's tokens: of its own encoder, or of the hidden states that it takes.
        text_depth: Layers of its own encoder.
        text_length: The most tokens L of a text.
        pad_token: What fills a text up to L tokens.
        end_token: What ends a text; None where none does.

    Raises:
        InputError: Sizes that do not divide; at the call, misshapen input.
    """

    conditioned_on: ClassVar[str] = "text"
    _no_split_modules: ClassVar[list[str]] = ["TextGSPNDiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["TextGSPNDiTBlock"]

    @register_to_config
    def __init__(
        self,
        width: int = 1152,
        depth: int = 28,
        num_groups: int = 18,
        mlp_ratio: float = 3.0,
        conv_kernel: int = 3,
        chunk: int | None = 32,
        global_layers: int | Sequence[int] = 2,
        windows: Literal["aligned", "shifted"] | None = "shifted",
        mixer: str = "gspn",
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        vocab_size: int | None = 49408,
        text_width: int = 768,
        text_depth: int = 12,
        text_length: int = 77,
        pad_token: int = 49407,
        end_token: int | None = 49407,
    ) -> None:
        counts = {"width": width, "depth": depth, "num_groups": num_groups}
        counts |= {"text_width": text_width, "text_depth": text_depth, "text_length": text_length}
        for name, value in counts.items():
            require_count(name, value)
        if mixer not in MIXERS:
            raise InputError(f"give one of {', '.join(MIXERS)}", argument="mixer", value=mixer)
        super().__init__(
            width=width,
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
        )
        self.text_width, self.text_length = text_width, text_length
        self.text_encoder = None
        if vocab_size is not None:
            require_count("vocab_size", vocab_size)
            self.text_encoder = SmallTextEncoder(
                vocab_size, text_width, text_depth, text_length, pad_token=pad_token, end_token=end_token
            )
        self.t_embedder = TimestepEmbedding(width)
        self.text_embedder = TextEmbedding(text_width, width)
        rank = max(width // 4, 1)
        self.modulation = nn.Sequential(
            nn.SiLU(), linear(width, NUM_VECTORS * width, zero=True), nn.Unflatten(-1, (NUM_VECTORS, width))
        )
        self.block_condition = nn.Sequential(nn.SiLU(), linear(width, rank))
        chunks = as_windows(chunk_by_layer(chunk, global_layers, depth), windows)
        self.chunks = tuple(chunks if MIXERS[mixer].scans else [None] * depth)
        self.blocks = nn.ModuleList(
            TextGSPNDiTBlock(
                width, rank, mlp_ratio, MIXERS[mixer].of_layer(i, width, num_groups, Projections(conv_kernel))
            )
            for i in range(depth)
        )
        self.final_layer = SharedFinalLayer(width, self.patch_values)

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        if self.text_encoder is not None:
            return {"input_ids": torch.zeros(batch, self.text_length, dtype=torch.long, device=self.device)}
        return {
            "encoder_hidden_states": torch.zeros(batch, self.text_length, self.text_width, device=self.device),
            "encoder_attention_mask": torch.ones(batch, self.text_length, dtype=torch.bool, device=self.device),
        }

    def read_text(
        self,
        batch: int,
        input_ids: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, text_width) and mask (B, L) of the text of a call.

        Raises :class:`InputError` for a text of the other kind, or a misshapen one.
        """
        if self.text_encoder is not None:
            if input_ids is None or encoder_hidden_states is not None or encoder_attention_mask is not None:
                raise InputError(
                    "this model has a text encoder of its own", argument="input_ids", wanted="tokens alone"
                )
            if input_ids.ndim != 2 or len(input_ids) != batch or input_ids.shape[1] > self.text_length:
                raise InputError(
                    f"shape {tuple(input_ids.shape)}",
                    argument="input_ids",
                    wanted=f"(B, L) with B = {batch} and L up to {self.text_length}",
                )
            return self.text_encoder(input_ids)
        if input_ids is not None or encoder_hidden_states is None or encoder_attention_mask is None:
            raise InputError(
                "this model has no text encoder of its own",
                argument="encoder_hidden_states",
                wanted="a frozen encoder's states, and their encoder_attention_mask",
            )
        shape = tuple(encoder_hidden_states.shape)
        if len(shape) != 3 or shape[0] != batch or shape[2] != self.text_width:
            raise InputError(
                f"shape {shape}",
                argument="encoder_hidden_states",
                wanted=f"(B, L, {self.text_width}) with B = {batch}",
            )
        if tuple(encoder_attention_mask.shape) != shape[:2]:
            raise InputError(
                f"shape {tuple(encoder_attention_mask.shape)}",
                argument="encoder_attention_mask",
                wanted=f"{shape[:2]}, as the states have tokens",
            )
        return encoder_hidden_states, encoder_attention_mask.bool()

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        input_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        chunk_scale: float = 1.0,
    ) -> Tensor:
        chunks = self.scaled_chunks(chunk_scale)
        x = self.patchify(latents)
        check_one_each(latents, timesteps=timesteps)
        states, mask = self.read_text(len(latents), input_ids, encoder_hidden_states, encoder_attention_mask)
        text, pooled = self.text_embedder(states, mask)
        condition = (self.t_embedder(timesteps) + pooled)[:, None, None]  # (B, 1, 1, C)
        modulation = self.modulation(condition)  # (B, 1, 1, 9, C)
        block_condition = self.block_condition(condition)  # (B, 1, 1, C // 4)
        for block, chunk in zip(self.blocks, chunks, strict=True):
            x = self.run(block, x, modulation, block_condition, text, mask, chunk)
        return self.unpatchify(self.final_layer(x, modulation))


class TextGSPNDiTBlock(nn.Module):
    """x += g₁ · mixer(adaLN(x)); x += g₂ · attention(adaLN(x), text); x += g₃ · mlp(adaLN(x)).

    Modulated as gspn-dit's block, by nine vectors in place of six. All start at zero: the block is the identity.
    """

    def __init__(self, width: int, rank: int, mlp_ratio: float, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.cross_attention = CrossAttention(width, width)
        self.mlp = FeedForward(width, mlp_ratio, SquaredReLU())
        self.modulation = nn.Sequential(
            linear(rank, NUM_VECTORS * width, zero=True), nn.Unflatten(-1, (NUM_VECTORS, width))
        )

    def forward(
        self, x: Tensor, modulation: Tensor, block_condition: Tensor, text: Tensor, mask: Tensor, chunk: Chunk = None
    ) -> Tensor:
        offset = self.modulation(block_condition)
        first, second, third, last = modulations(x, modulation, offset, PASSES_WITH_TEXT)
        y = self.mixer(modulated_norm(x, *first), chunk)
        x, y = gated_residual_norm(x, y, *second)
        x, y = gated_residual_norm(x, self.cross_attention(y, text, mask), *third)
        return gated_residual(x, self.mlp(y), *last)


class TextEmbedding(nn.Module):
    """Hidden states of a text as tokens of the model's width, and their mean as one vector.

    States (B, L, D) and mask (B, L) to (B, L, C) and (B, C). The mean is over the text's own tokens, and normalised, so
    that a long text weighs as much as a short one.
    """

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.norm, self.pooled_norm = ChannelNorm(text_width), ChannelNorm(text_width)
        self.mlp = nn.Sequential(linear(text_width, width), nn.GELU(approximate="tanh"), linear(width, width))
        self.pooled = linear(text_width, width)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.norm(states.to(self.norm.weight.dtype))
        weight = mask.to(states.dtype).unsqueeze(-1)
        mean = (weight * states).sum(1) / weight.sum(1).clamp(min=1)
        return self.mlp(states), self.pooled(self.pooled_norm(mean))


class SmallTextEncoder(nn.Module):
    """A transformer over a text's tokens that trains with the model: each token sees all of its text.

    Tokens (B, L) to states (B, L, D) and the mask (B, L) of the text's own tokens.
    """

    def __init__(
        self, vocab_size: int, width: int, depth: int, length: int, *, pad_token: int, end_token: int | None
    ) -> None:
        super().__init__()
        self.pad_token, self.end_token = pad_token, end_token
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(TextLayer(width) for _ in range(depth))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = token_mask(input_ids, self.pad_token, self.end_token)
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return x, mask


class TextLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), (B, L, D) to the same, tokens outside the mask unseen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = ChannelNorm(width), ChannelNorm(width)
        self.attention = CrossAttention(width, width)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(approximate="tanh"), linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, mask)
        return x + self.mlp(self.mlp_norm(x))
