"""Text: captions to tokens, and tokens to the hidden states of a text encoder of transformers, without a network."""

from gspn_dit.exports import on_demand

_EXPORTS = {
    "TextEncoder": "gspn_dit.text.encoder",
    "load_text_encoder": "gspn_dit.text.encoder",
    "load_tokenizer": "gspn_dit.text.tokens",
    "tokenize": "gspn_dit.text.tokens",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
