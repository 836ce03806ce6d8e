"""Layers between the operator (`gspn_dit.ops`) and the models. Maps are channels last, (B, H, W, C), throughout.

A token is a place of the map, its C channels. A line is a row or a column of tokens, a position a place in a line, a
chunk a number of lines that a scan runs over before it starts anew.

    mixers         what replaces attention: line scans, and the baselines they are compared with
    gspn_core      the GSPN paper's scan, with gates for every channel
    fused          norms, residuals, activation and convolution that are one pass over the map each on a GPU
    feed_forward, convolution, norm, modulation, linear
    embeddings     patches, times, class labels and positions as vectors
    drop_path      branches that training leaves out
    chunks         which layer's scans have which chunk, and the chunks at other sizes

This package imports `gspn_dit.ops` and `gspn_dit.errors` alone.
"""
