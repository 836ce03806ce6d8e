"""The backend `native-cuda`: CUDA of csrc/, for tensors on NVIDIA GPUs of compute capability 8.0 and newer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gspn_dit.errors import warn
from gspn_dit.ops.backend import Call, Status
from gspn_dit.ops.build import architectures, built
from gspn_dit.ops.compiled import Compiled
from gspn_dit.ops.tensor_core_check import disagreement, wanted


class NativeCuda(Compiled):
    """CUDA, for float32, bfloat16 and float16, on the current stream of the tensors' device."""

    name = "native-cuda"
    device_types = ("cuda",)
    priority = 100

    def __init__(self) -> None:
        super().__init__()
        self.library: Path | None = None
        self._on_device: dict[int, Status] = {}

    def load(self) -> str:
        """Build and load torch.ops.gspn_dit_cuda."""
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        self.library = built("cuda")
        if not hasattr(torch.ops.gspn_dit_cuda, "propagate"):  # building it has loaded it
            torch.ops.load_library(self.library)
        return f"CUDA, for {', '.join(architectures())}, {self.library}"

    def status(self, device: torch.device | None = None) -> Status:
        """Whether the library is there and runs on the device. Other devices are not asked: that takes memory there."""
        loaded = super().status()
        if not loaded.available:
            return loaded
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        if index not in self._on_device:
            reason = self._unusable(index)
            self._on_device[index] = Status(False, reason) if reason else loaded
            if not reason:
                self._check_tensor_cores(torch.device("cuda", index))
        return self._on_device[index]

    def supports(self, call: Call, backward: bool = False) -> str | None:
        """Why the kernels cannot run a pass: a line of many thousand tokens does not fit into shared memory."""
        return torch.ops.gspn_dit_cuda.refusal.default(*call, backward) or None

    def forward(self, call: Call) -> Tensor:
        """y."""
        return torch.ops.gspn_dit_cuda.propagate.default(*call)

    def backward(self, grad: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Gradients of the operands."""
        return torch.ops.gspn_dit_cuda.propagate_backward.default(grad, *call)

    def supports_tail(self, call: Call, backward: bool = False) -> bool:
        """True: where the scans' kernel has no tail, it is a pass of its own."""
        return True

    def forward_with_tail(self, call: Call, direct: Tensor) -> tuple[Tensor, Tensor]:
        """y and 1 / rms."""
        return torch.ops.gspn_dit_cuda.propagate_with_tail.default(*call, direct)

    def backward_with_tail(
        self, grad: Tensor, y: Tensor, inverse_rms: Tensor, call: Call, direct: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of the operands and of direct."""
        backward = torch.ops.gspn_dit_cuda.propagate_backward_with_tail.default
        return backward(grad, y, inverse_rms, *call, direct)

    def _check_tensor_cores(self, device: torch.device) -> None:
        """Leave 16-bit calls to the exact kernels if those on tensor cores are not wanted, or are wrong here."""
        reason = disagreement(self, device) if wanted() else None
        if reason:
            name = torch.cuda.get_device_name(device)
            warn(f"the kernels on tensor cores are not used: on {device} ({name}) {reason}; please report this")
        if reason or not wanted():
            torch.ops.gspn_dit_cuda.use_tensor_cores.default(False)

    def _unusable(self, index: int) -> str:
        """Why the library does not run on cuda:index, and the remedy; empty if it does."""
        reason = torch.ops.gspn_dit_cuda.unusable.default(torch.empty(0, device=f"cuda:{index}"))
        if not reason:
            return ""
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        return (
            f"{self.library} does not run on cuda:{index} ({name}, compute capability {major}.{minor}): {reason}; "
            "leave TORCH_CUDA_ARCH_LIST unset or add this one to it, and build the kernel anew"
        )
