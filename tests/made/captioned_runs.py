"""Tiny trainings of text-to-image models: their options."""

from gspn_dit.options import parse
from gspn_dit.text_to_image_config import TextToImageConfig

UNET = "{block_out_channels: [8, 16], layers_per_block: 1, attention_head_dim: 2, norm_num_groups: 4}"
TEXT_ENCODER = "{hidden_size: 16, num_hidden_layers: 1, max_position_embeddings: 16}"


def options(run, source, tokenizer, *changes):
    """A tiny run on 8×8 latents. Later `--key value` pairs win."""
    given = [
        *("--output_dir", run, "--data.source", source, "--data.vae", "digits", "--data.image_size", 32),
        *("--data.num_workers", 0, "--model.tokenizer", tokenizer),
        *("--model.unet", UNET, "--model.text_encoder", TEXT_ENCODER),
        *("--training.max_steps", 6, "--training.batch_size", 4, "--training.learning_rate", "1e-3"),
        *("--training.log_every", 1, "--training.sample_every", 0, "--training.checkpoint_every", 3),
        *("--training.trackers", "[]", "--training.mixed_precision", "no"),
        *("--sampling.num_inference_steps", 2, "--sampling.guidance_scale", 3),
        *changes,
    ]
    return [str(value) for value in given]


def config(run, source, tokenizer, *changes):
    return parse(TextToImageConfig, options(run, source, tokenizer, *changes), exit_on_error=False)
