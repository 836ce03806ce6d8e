"""A run as a folder that diffusers loads."""

import json

import numpy as np
import pytest
from made_runs import make_run

from gspn_dit import GSPNDiTPipeline
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.export import Options, main
from gspn_dit.pipeline import load_pipeline


@pytest.mark.parametrize(
    ("name", "objective"), [("gspn-dit-ti-2", "flow"), ("dit-ti-2", "ddpm"), ("gspn-ti-2", "flow")]
)
def test_an_exported_run_gives_the_same_images(tmp_path, name, objective):
    run, out = make_run(tmp_path / "run", name, objective), tmp_path / "exported"
    main(Options(str(run), str(out)))
    pictures = [
        pipe([0, "goldfish"], generator=[image_generator(3, i) for i in range(2)], output_type="np").images
        for pipe in (load_pipeline(run), load_pipeline(out), GSPNDiTPipeline.from_pretrained(out))
    ]
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])
    assert str(tmp_path) not in "".join(path.read_text() for path in out.rglob("*.json"))
    assert json.loads((out / "model_index.json").read_text())["transformer"][0] == "gspn_dit"


def test_an_existing_folder_is_not_overwritten(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "exported").mkdir()
    with pytest.raises(InputError, match="exists already"):
        main(Options(str(run), str(tmp_path / "exported")))


def test_a_folder_that_is_no_run_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        main(Options(str(tmp_path / "nowhere"), str(tmp_path / "exported")))
    assert not list(tmp_path.iterdir())
