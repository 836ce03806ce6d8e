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

    def supports_tail(self, call: Call, backward: bool = False) -> bool:
        """Whether the type is one of those in use: others take the plain tail."""
        return call.x.dtype in (torch.float32, torch.bfloat16)

    def forward_with_tail(self, call: Call, direct: Tensor) -> tuple[Tensor, Tensor]:
        """y and 1 / rms."""
        return torch.ops.gspn_dit_cpu.propagate_with_tail.default(*call, direct)

    def backward_with_tail(
        self, grad: Tensor, y: Tensor, inverse_rms: Tensor, call: Call, direct: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of the operands and of direct."""
        backward = torch.ops.gspn_dit_cpu.propagate_backward_with_tail.default
        return backward(grad, y, inverse_rms, *call, direct)


def _widened(call: Call) -> Call:
    """The call with float32 in place of float16."""
    halves: dict[str, Any] = {
        name: v.float() for name, v in call._asdict().items() if isinstance(v, Tensor) and v.dtype == torch.float16
    }
    return call._replace(**halves)
