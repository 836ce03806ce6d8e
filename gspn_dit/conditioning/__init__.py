"""What an image is made from: reading it, its null value, and dropping it for classifier-free guidance.

Each kind of condition is one file here, which follows the protocol :class:`Conditioning`. Objectives, the sampler, the
training step and the counters pass the tensors on by name, as arguments of the model, and do not look into them.
"""

from gspn_dit.exports import on_demand

_EXPORTS = {
    "ClassLabels": "gspn_dit.conditioning.class_labels",
    "Condition": "gspn_dit.conditioning.condition",
    "Conditioning": "gspn_dit.conditioning.condition",
    "EncodedTokens": "gspn_dit.conditioning.text",
    "TextStates": "gspn_dit.conditioning.text",
    "TextTokens": "gspn_dit.conditioning.text",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
