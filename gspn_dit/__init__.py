"""Class-conditional diffusion transformers with GSPN line scans instead of attention."""

from gspn_dit.exports import on_demand
from gspn_dit.successors import tell_successors

# ModelMixin and SchedulerMixin are here for diffusers, which finds out how to load a pipeline's component by looking
# for its base classes in the component's own top-level package.
_EXPORTS = {
    "propagate": "gspn_dit.ops",
    "create_model": "gspn_dit.models",
    "list_models": "gspn_dit.models",
    "create_classifier": "gspn_dit.models",
    "list_classifiers": "gspn_dit.models",
    "DiT": "gspn_dit.models",
    "GSPN": "gspn_dit.models",
    "GSPNDiT": "gspn_dit.models",
    "TextGSPNDiT": "gspn_dit.models",
    "GSPNClassifier": "gspn_dit.models",
    "replace_self_attention": "gspn_dit.models",
    "AttentionReplacement": "gspn_dit.models",
    "GSPNDiTPipeline": "gspn_dit.inference.pipeline",
    "FlowMatchSDEScheduler": "gspn_dit.diffusion.sde",
    "FlowMatchDopri5Scheduler": "gspn_dit.diffusion.ode",
    "EDMHeunScheduler": "gspn_dit.diffusion.edm",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}

__version__ = "0.1.0"
__all__ = [name for name in _EXPORTS if _EXPORTS[name] != "diffusers"]
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
tell_successors()
