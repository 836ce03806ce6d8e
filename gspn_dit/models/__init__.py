"""The networks, by name or by class: `dit` (the baseline), `gspn` (the paper's), `gspn-dit` (this project's)
and `gspn-t2i` (the same with cross-attention to text).

A family is a file here: its class, its sizes and how the class is registered. The rest is what families share:
`latent_model` (their base), `registry` (names). `published` makes a `dit` of what DiT and SiT have published.
`classifier` has the networks that classify images, with names of their own, and `features` their stages' maps.
All models share `saved_model` and `macs` (what a forward costs).
"""

from gspn_dit.exports import on_demand

# A family's class and the module that registers it, in the order of their names' list.
FAMILIES = {
    "DiT": "gspn_dit.models.dit",
    "GSPN": "gspn_dit.models.gspn",
    "GSPNDiT": "gspn_dit.models.gspn_dit",
    "TextGSPNDiT": "gspn_dit.models.text_gspn_dit",
}
_EXPORTS = {
    **FAMILIES,
    "create_model": "gspn_dit.models.registry",
    "list_models": "gspn_dit.models.registry",
    "register_model": "gspn_dit.models.registry",
    "GSPNClassifier": "gspn_dit.models.classifier",
    "create_classifier": "gspn_dit.models.classifier",
    "list_classifiers": "gspn_dit.models.classifier",
    "replace_self_attention": "gspn_dit.models.attention_replacement",
    "AttentionReplacement": "gspn_dit.models.attention_replacement",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
