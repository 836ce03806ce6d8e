"""Weights in the formats that DiT, SiT and diffusers publish theirs in: real networks, tiny and at random."""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from made.runs import tiny_vae
from torch import Tensor


def diffusers_dit(num_classes: int = 10, **options) -> DiTTransformer2DModel:
    """A DiTTransformer2DModel in which nothing is zero, and whose blocks share embedders as the published one's do."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 3, "attention_head_dim": 64, "num_layers": 2, "sample_size": 8, "out_channels": 8}
    network = DiTTransformer2DModel(**{**sizes, "num_embeds_ada_norm": num_classes, **options}).eval()
    embedders = network.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        embedders.class_embedder.embedding_table.weight.mul_(0.5)
        for block in network.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(embedders.state_dict())
    return network


def as_of_dits_code(network: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The network as DiT's own code and SiT's have it.

    Times have the frequencies 10000^(-i/128), where diffusers has 10000^(-i/127); every norm adds 1e-6, not 1e-5.
    """
    for block in network.transformer_blocks:
        block.norm3.eps = 1e-6
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return network


def dit_state_dict(network: DiTTransformer2DModel) -> dict[str, Tensor]:
    """The network's weights by the names of DiT's own code, which SiT's has too."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    }
    for n in range(len(network.transformer_blocks)):
        theirs, ours = f"transformer_blocks.{n}", f"blocks.{n}"
        names[f"{theirs}.norm1.linear"] = f"{ours}.adaLN_modulation.1"
        names[f"{theirs}.attn1.to_out.0"] = f"{ours}.attn.proj"
        names[f"{theirs}.ff.net.0.proj"] = f"{ours}.mlp.fc1"
        names[f"{theirs}.ff.net.2"] = f"{ours}.mlp.fc2"
    state, weights = {"pos_embed": network.pos_embed.pos_embed.clone()}, network.state_dict()
    for name, tensor in weights.items():
        module, _, part = name.rpartition(".")
        if module in names:
            state[f"{names[module]}.{part}"] = tensor
        elif module.endswith("to_q"):
            three = [weights[name.replace("to_q", one)] for one in ("to_q", "to_k", "to_v")]
            state[f"blocks.{module.split('.')[1]}.attn.qkv.{part}"] = torch.cat(three)
    return state


def sit_state_dict(network: DiTTransformer2DModel) -> dict[str, Tensor]:
    """As that of a SiT whose variance channels are as they began, zero."""
    state = dit_state_dict(network)
    for part in ("weight", "bias"):
        state[f"final_layer.linear.{part}"] = state[f"final_layer.linear.{part}"].clone()
        state[f"final_layer.linear.{part}"].unflatten(0, (-1, 8))[:, 4:] = 0
    return state


def save_dit_pipeline(folder: Path, network: DiTTransformer2DModel, **options) -> DiTPipeline:
    """A pipeline as `facebook/DiT-XL-2-256` is one, saved to a folder."""
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipe = DiTPipeline(network, tiny_vae(), scheduler)
    pipe.save_pretrained(folder, **options)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(n): f"animal {n}, creature {n}" for n in range(network.config.num_embeds_ada_norm)}
    (folder / "model_index.json").write_text(json.dumps(index))  # as the published one; none are saved
    pipe.set_progress_bar_config(disable=True)
    return pipe
