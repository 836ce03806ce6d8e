"""Class-conditional diffusion transformers with GSPN line scans instead of attention."""

from gspn_dit.exports import on_demand
from gspn_dit.successors import tell_successors

# ModelMixin is here for diffusers, which finds out how to load a pipeline's component by looking for its base classes
# in the component's own top-level package.
_EXPORTS = {
    "propagate": "gspn_dit.ops",
    "create_model": "gspn_dit.models",
    "list_models": "gspn_dit.models",
    "create_classifier": "gspn_dit.models",
    "list_classifiers": "gspn_dit.models",
    "DiT": "gspn_dit.models",
    "GSPN": "gspn_dit.models",
    "GSPNDiT": "gspn_dit.models",
    "GSPNClassifier": "gspn_dit.models",
    "replace_self_attention": "gspn_dit.models",
    "AttentionReplacement": "gspn_dit.models",
    "GSPNDiTPipeline": "gspn_dit.inference.pipeline",
    "ModelMixin": "diffusers",
}

__version__ = "0.1.0"
__all__ = [name for name in _EXPORTS if name != "ModelMixin"]
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
tell_successors()
