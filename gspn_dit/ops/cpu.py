"""The backend `native-cpu`: C++ of csrc/, for tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gspn_dit.ops.backend import Call
from gspn_dit.ops.build import built
from gspn_dit.ops.compiled import Compiled


class NativeCpu(Compiled):
    """C++, vectorised over channels, on torch's threads; float16 goes through float32 copies."""

    name = "native-cpu"
    device_types = ("cpu",)
    priority = 100

    def load(self) -> str:
        """Build and load torch.ops.gspn_dit_cpu."""
        library = built("cpu")
        if not hasattr(torch.ops.gspn_dit_cpu, "propagate"):  # building it has loaded it
            torch.ops.load_library(library)
        return f"C++, {torch.get_num_threads()} threads, {library}"

    def supports(self, call: Call, backward: bool = False) -> str | None:
        """None: it runs every call."""
        return None

    def forward(self, call: Call) -> Tensor:
        """y."""
        if call.x.dtype == torch.float16:
            return self.forward(_widened(call)).half()
        return torch.ops.gspn_dit_cpu.propagate.default(*call)

    def backward(self, grad: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Gradients of the operands."""
        if call.x.dtype == torch.float16:
            grads = self.backward(grad.float(), _widened(call))
            return tuple(
                g.to((call.x if like is None else like).dtype) for g, like in zip(grads, call.operands, strict=True)
            )
        return torch.ops.gspn_dit_cpu.propagate_backward.default(grad, *call)


def _widened(call: Call) -> Call:
    """The call with float32 in place of float16."""
    halves: dict[str, Any] = {
        name: v.float() for name, v in call._asdict().items() if isinstance(v, Tensor) and v.dtype == torch.float16
    }
    return call._replace(**halves)
