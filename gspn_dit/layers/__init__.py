"""What networks are made of: embeddings, blocks, token mixers. Maps are channels last, (B, H, W, C)."""
