"""What every training refuses at its start, of the machine and of how it was launched."""

from __future__ import annotations

from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from gspn_dit.config import LoopConfig
from gspn_dit.errors import InputError


def check_machine(options: LoopConfig) -> None:
    """Raise :class:`InputError` for a precision that this device lacks, or a tracker that is not installed."""
    if options.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise InputError(
            "needs an accelerator",
            argument="training.mixed_precision",
            value="fp16",
            remedy="on the CPU use 'bf16' or 'no'",
        )
    trackers = [tracker.value for tracker in get_available_trackers()]
    for name in options.trackers:
        if name not in trackers:
            raise InputError(
                f"{name!r} is not installed here",
                argument="training.trackers",
                remedy=f"there are {', '.join(trackers)}",
            )


def check_launch(accelerator: Accelerator) -> None:
    """Raise :class:`InputError` for a way of sharing training that checkpoints and averages do not know."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            argument="distributed_type",
            value=accelerator.distributed_type.value,
            wanted="several processes as they are, or FSDP2",
        )
    if accelerator.distributed_type is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            argument="fsdp_version",
            value=1,
            wanted="2",
            remedy="launch with --fsdp_version 2 or configs/accelerate/fsdp.yaml",
        )
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing:  # accelerate's renames weights and drops other blocks when it goes back
            raise InputError(
                argument="fsdp_activation_checkpointing",
                value=True,
                wanted="false, and --training.gradient-checkpointing true instead",
            )
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise InputError(
                argument="fsdp_offload_params",
                value=True,
                wanted="false",
                remedy="averages and samples are for the GPUs' memory",
            )
    if accelerator.device.type == "mps":
        raise InputError(
            "lacks the float64 that training needs",
            argument="device",
            value="mps",
            remedy="set ACCELERATE_USE_CPU=true",
        )
