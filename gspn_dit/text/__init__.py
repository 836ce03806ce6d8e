"""Text for a network: tokens, hidden states, and what the pipelines of Stable Diffusion make of a prompt."""
