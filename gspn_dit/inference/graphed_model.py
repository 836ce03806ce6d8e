"""A model whose forwards are replayed as CUDA graphs: the denoising steps of small models, which launches bind."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.arguments import Switch
from gspn_dit.cuda_graphs import CudaRecorder, Recorder, reason_of
from gspn_dit.errors import InputError, not_none, warn
from gspn_dit.launches import Choice, calls_before_capture, work_of
from gspn_dit.models.latent_model import LatentModel

KEPT = 4  # recordings: with and without guidance, a full batch and the last one
REHEARSALS = 2
TOLERANCE = 1e-2  # of the largest value, between a replay and the same forward launched as usual
Key = tuple[Any, ...]

logger = logging.getLogger(__name__)


class GraphedModel:
    """Called as the model is, on a GPU and without gradients, by one thread at a time; what it returns is the caller's.

    Calls of the same shapes, dtypes and options replay one recording. The first calls run as usual: all of them where
    the model's own work outlasts its launches, else as many as recording one takes the time of. A recording reads the
    weights where they are: changed in place, they are heeded; moved or replaced, :meth:`forget_moved` records anew.

    A recording that fails, or does not compute what the model does, is warned of once; from there on the model runs as
    usual.

    Args:
        model: Of this package.
        asked: `True` records at the first call; `auto` by the rule.
        recorder: What records; None for the model's GPU.
    """

    def __init__(self, model: LatentModel, asked: Switch, recorder: Recorder | None = None) -> None:
        self.model, self.asked = model, asked
        self._recorder = recorder
        self._recorded: OrderedDict[Key, _Recorded] = OrderedDict()
        self._calls: Counter[Key] = Counter()
        self._places = _places(model)
        self._failed = False

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.model.dtype

    @property
    def recordings(self) -> int:
        """How many there are."""
        return len(self._recorded)

    def forget_moved(self) -> None:
        """Let go of the recordings if a weight is not where it was; to be called before a series of calls."""
        if (places := _places(self.model)) != self._places:
            self._recorded.clear()
            self._places = places

    def __call__(self, latents: Tensor, timesteps: Tensor, **arguments: Any) -> Tensor:
        inputs = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        options = {name: value for name, value in arguments.items() if name not in inputs}
        inputs |= {"latents": latents, "timesteps": timesteps}
        key = _key(inputs, options)
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return self._recorded[key].replay(inputs)
        if not self._failed and self._is_due(key, latents):
            try:
                return self._record(key, inputs, options)
            except RuntimeError as error:
                self._failed = True
                self._recorded.clear()
                warn(f"cuda_graph={self.asked!r}: {reason_of(error)}; sampling goes on without")
        self._calls[key] += 1
        return self.model(latents, timesteps, **arguments)

    def _is_due(self, key: Key, latents: Tensor) -> bool:
        """Whether calls of this key have run as usual for long enough."""
        if self.asked is True:
            return True
        wait = calls_before_capture(work_of(self.model, latents.shape))
        return wait is not None and self._calls[key] >= wait

    def _record(self, key: Key, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        """Record a call, and do it."""
        if self._recorder is None:
            self._recorder = CudaRecorder(latents_device(inputs))
        recorded, usual = record(self._recorder, lambda **given: self.model(**given, **options), inputs)
        replayed = recorded.replay(inputs)
        difference = (replayed - usual).abs().max().item()
        if usual.isfinite().all() and not difference <= TOLERANCE * usual.abs().max().item():
            raise RuntimeError(f"a replay differs from the model by {difference:.1e}")
        self._recorded[key] = recorded
        while len(self._recorded) > KEPT:
            self._recorded.popitem(last=False)
        logger.debug(f"forwards of {tuple(inputs['latents'].shape)} are a CUDA graph from here on")
        return replayed


@dataclass
class _Recorded:
    """One recording: the places of its inputs and of its result, and its replay."""

    inputs: dict[str, Tensor]
    output: Tensor
    launch: Callable[[], None]

    def replay(self, inputs: dict[str, Tensor]) -> Tensor:
        """The result for other inputs of the same names and shapes, as a tensor of its own: some samplers keep it."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.launch()
        return self.output.clone()


def record(recorder: Recorder, function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[_Recorded, Tensor]:
    """A function of named tensors as a recording, and its result for those inputs as it computes it otherwise."""
    places = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
    kind = latents_device(inputs).type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def work() -> Tensor:
        # Weights are cast in the recording: a cast that is kept from before would be of old weights, or gone.
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            return function(**places)

    for _ in range(REHEARSALS):
        usual = recorder.rehearse(work)
    return _Recorded(places, *recorder.record(work)), usual


def why_not_graph(model: nn.Module, device: torch.device) -> str | None:
    """Why a model's forward on a device cannot be a CUDA graph; None if it can."""
    if device.type != "cuda":
        return f"the transformer is on {device.type}"
    if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in (*model.parameters(), *model.buffers())):
        return "nobody knows where weights of a type of their own lie"  # quantised ones, say
    for module in model.modules():
        if getattr(module, "_hf_hook", None) is not None:
            return "its weights come and go (CPU offload)"
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_diffusers_hook"):
            return "a replay would leave out its hooks"
    return None


def graph_choice(model: LatentModel, asked: Switch, device: torch.device, latents: Sequence[int]) -> Choice:
    """What is asked for as it will be for latents (B, C, h, w), in words. Raises as :func:`graphed`."""
    doing, leaving = "denoising steps are replayed as a CUDA graph", "denoising steps are launched as usual"
    if graphed(model, asked, device) is None:
        reason = "" if asked is False else not_none(why_not_graph(model, device))
        return Choice("cuda_graph", asked, False, reason, doing, leaving)
    work = work_of(model, latents)
    wait = calls_before_capture(work)
    if asked is True:
        return Choice("cuda_graph", asked, True, "", doing, leaving)
    if wait is None:
        return Choice("cuda_graph", asked, False, "the model's work outlasts its launches", doing, leaving)
    return Choice("cuda_graph", asked, True, f"launches bind it; after the first {wait}", doing, leaving)


def graphed(
    model: LatentModel, asked: Switch, device: torch.device, before: GraphedModel | None = None
) -> GraphedModel | None:
    """A model as a graphed one, with what was recorded before if it is the same model; None where it is not to be.

    Raises :class:`InputError` if one is asked for where there can be none.
    """
    if asked is False:
        return None
    if (reason := why_not_graph(model, device)) is not None:
        if asked is True:
            raise InputError(reason, argument="cuda_graph", value=True, remedy="leave it out")
        return None
    if before is None or before.model is not model or before.asked != asked:
        return GraphedModel(model, asked)
    before.forget_moved()
    return before


def latents_device(inputs: dict[str, Tensor]) -> torch.device:
    """Where a forward's inputs are."""
    return inputs["latents"].device


def _key(inputs: dict[str, Tensor], options: dict[str, Any]) -> Key:
    """What a recording holds fast."""
    kind = latents_device(inputs).type
    computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tensors = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in sorted(inputs.items()))
    return tensors, tuple(sorted(options.items())), computed_in


def _places(model: nn.Module) -> Sequence[Any]:
    """Where a model's tensors lie, and its mode."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(tensor.data_ptr(), tensor.dtype) for tensor in tensors] + [model.training]
