"""The computed budget, against what training really holds, and the page that shows it."""

import pytest
import torch
from made.training import ROOT

from gspn_dit.commands import BudgetOptions as Options
from gspn_dit.errors import InputError
from gspn_dit.models import create_model
from gspn_dit.training.budget import activation_bytes, main


@pytest.mark.slow
def test_activations_are_those_of_a_real_forward():
    def build():
        torch.manual_seed(0)
        return create_model("dit-ti-2", depth=2)

    model = build()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    sizes = []
    for batch in (2, 3):
        kept.clear()
        arguments = torch.randn(batch, 4, 16, 16), torch.rand(batch), torch.zeros(batch, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            held = model(*arguments)
        sizes.append(sum(kept.values()))
        del held
    assert activation_bytes(build, 16) == pytest.approx(sizes[1] - sizes[0], rel=0.02)


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(capsys):
    main(Options(names=["gspn-dit-b-2"]))
    page = (ROOT / "docs" / "cluster.md").read_text()
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) > 8
    assert all(line in page for line in printed)


@pytest.mark.slow
def test_the_page_of_classifiers_shows_it_too(capsys):
    main(Options(names=["gspn-t"], image_size=224, batch_size=2048, gpus=[8], utilisation=0.2, steps=187_671))
    page = (ROOT / "docs" / "classification.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and all(row in page for row in rows)


def test_bad_options_are_named():
    with pytest.raises(InputError, match=r"^gpus=3: wanted a divisor of 256"):
        Options(gpus=[3])
    with pytest.raises(InputError, match=r"^utilisation=40"):
        Options(utilisation=40)
