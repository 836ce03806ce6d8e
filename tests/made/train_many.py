"""Started by `accelerate launch`: train the runs of a JSON list, each a kind and a command line, one after the other.

accelerate turns FSDP on for accelerators only. Here it is told that the processes' CPUs are such: from there on it is
accelerate's own FSDP2, over gloo.

torch.compile's graphs are run as they are traced: that is where processes come in, and C++ of them takes minutes.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from gspn_dit.classifier_config import ClassifierConfig
from gspn_dit.config import Config
from gspn_dit.distillation_config import DistillationConfig
from gspn_dit.layers.embeddings import TimestepEmbedding
from gspn_dit.messages import plain_messages
from gspn_dit.options import parse
from gspn_dit.text_to_image_config import TextToImageConfig
from gspn_dit.training.loop import train

initialise = AcceleratorState.__init__


def with_fsdp_on_the_cpu(self, *args, fsdp_plugin=None, **kwargs):
    first = not AcceleratorState._shared_state
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first and fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp_on_the_cpu
embed = TimestepEmbedding.forward


def embed_exact_times(self, timesteps):
    assert timesteps.dtype == torch.float32, "times above 512 are multiples of 4 in bfloat16"
    return embed(self, timesteps)


TimestepEmbedding.forward = embed_exact_times
compile_module = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **options: compile_module(self, backend="aot_eager", **options)
PartialState.destroy_process_group = lambda self, group=None: None  # the next run talks over it too

kinds = {each.__name__: each for each in (Config, ClassifierConfig, DistillationConfig, TextToImageConfig)}
for kind, argv in json.loads(Path(sys.argv[1]).read_text()):
    with plain_messages():
        train(parse(kinds[kind], argv))
    AcceleratorState._reset_state()

if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads do not end well with the interpreter
