"""Started by `accelerate launch`: make a reference and score samples, by the two command lines of a JSON list."""

import json
import sys

import torch
from accelerate.state import PartialState

from gspn_dit.commands import EvaluateOptions, ReferenceOptions
from gspn_dit.evaluation import evaluate, reference
from gspn_dit.options import command

PartialState.destroy_process_group = lambda self, group=None: None  # the second command talks over it too

kinds = (reference, ReferenceOptions), (evaluate, EvaluateOptions)
for (module, options), argv in zip(kinds, json.loads(sys.argv[1]), strict=True):
    command(module.main, options, prog=module.__name__, argv=argv)

if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads do not end well with the interpreter
