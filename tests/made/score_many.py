"""Started by `accelerate launch`: make a reference and score samples, by the two command lines of a JSON list."""

import json
import sys

from accelerate.state import PartialState

from gspn_dit.evaluation import evaluate, reference
from gspn_dit.options import command

PartialState.destroy_process_group = lambda self, group=None: None  # the second command talks over it too

for module, argv in zip((reference, evaluate), json.loads(sys.argv[1]), strict=True):
    command(module.main, module.Options, prog=module.__name__, argv=argv)
