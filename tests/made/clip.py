"""A CLIP model of a few kilobytes."""

import torch
from made.captions import write_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

SIDE = 16


def write_clip(folder, side=SIDE):
    """A CLIPModel of random weights, its tokenizer and its processor of `side` pixels, as transformers saves them."""
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "vocabulary"), model_max_length=40)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**layers, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**text, "pad_token_id": tokenizer.pad_token_id},
            vision_config={**layers, "image_size": SIDE, "patch_size": 8},
            projection_dim=8,
        )
    )
    with torch.no_grad():  # away from weights so small that all texts and pictures are alike
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder
