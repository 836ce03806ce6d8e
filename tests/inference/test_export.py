"""A run as a folder that diffusers loads."""

import json
import shutil

import numpy as np
import pytest
import yaml
from made.launched import run_apart
from made.runs import CLASS_NAMES, make_run
from PIL import Image

from gspn_dit import GSPNDiTPipeline
from gspn_dit.commands import ExportOptions as Options
from gspn_dit.commands import SampleOptions
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.inference.export import main
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.inference.sample import main as sample
from gspn_dit.options import command


def card(folder):
    """The front matter and the text of a folder's model card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


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
    texts = [path.read_text() for pattern in ("*.json", "*.md") for path in out.rglob(pattern)]
    assert not any(str(tmp_path) in text for text in texts)
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


@pytest.mark.slow
def test_an_export_elsewhere_draws_what_sample_draws_here(tmp_path):
    """In another process, in another folder, with the run and the folder's old place gone."""
    run = make_run(tmp_path / "run")
    here = str(tmp_path / "here.npz")  # in float32, as a pipeline draws unless it is told otherwise
    sample(SampleOptions(str(run), num_images=3, seed=5, npz=here, device="cpu", mixed_precision="no"))
    command(main, Options, prog="export", argv=[str(run), str(tmp_path / "exported")], positional=("model", "out"))
    shutil.rmtree(run)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "exported").rename(elsewhere / "moved")
    program = (
        "from gspn_dit import GSPNDiTPipeline; from gspn_dit.diffusion import image_generator; import numpy\n"
        "pipe = GSPNDiTPipeline.from_pretrained('moved')\n"
        "images = pipe(class_labels=[0, 'tabby cat', 2], generator=[image_generator(5, i) for i in range(3)]).images\n"
        "numpy.save('there.npy', numpy.stack([numpy.asarray(image) for image in images]))"
    )
    run_apart(program, elsewhere)
    assert np.array_equal(np.load(elsewhere / "there.npy"), np.load(tmp_path / "here.npz")["arr_0"])


def test_the_model_card_says_what_the_model_is_and_how_it_scored(tmp_path):
    from huggingface_hub import ModelCard

    run, out = make_run(tmp_path / "run", steps=(2, 4)), tmp_path / "exported"
    (run / "metrics.csv").write_text("step,loss,learning_rate,grad_norm,images_per_second\n2,9,1,1,1\n4,0.5,1,1,1\n")
    (run / "evaluation.csv").write_text("step,fd,num_samples\n4,12.25,100\n")
    sources = {"samples": str(tmp_path), "reference": str(tmp_path / "real.npz"), "features": "inception"}
    figures = {"fid": 31.5, "num_reference": None, "precision_recall_neighbours": 3}
    (run / "metrics.json").write_text(json.dumps(figures | sources))
    (run / "samples").mkdir()
    Image.new("RGB", (8, 8), "teal").save(run / "samples" / "step-0000004.png")
    main(Options(str(run), str(out)))

    front, text = card(out)
    assert "class-conditional" in front["tags"]
    assert ModelCard((out / "README.md").read_text()).data.library_name == front["library_name"] == "gspn-dit"
    assert front["metrics"] == ["fid", "fd"]
    assert str(tmp_path) not in text and "reference | real.npz |" in text and "features | inception |" in text
    for figure in ("training_loss | 0.5", "fd | 12.25", "fid | 31.5", "for 4 steps", *CLASS_NAMES):
        assert figure in text
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["model"]["name"] == "gspn-dit-ti-2"
    assert config["data"]["vae"] == "vae" and "output_dir" not in config
    assert "![Samples](samples.png)" in text
    assert Image.open(out / "samples.png").getpixel((0, 0)) == (0, 128, 128)  # the one that training drew

    main(Options(str(run / "checkpoints" / "step-0000002"), str(tmp_path / "older")))
    _, text = card(tmp_path / "older")
    assert "training_loss | 9" in text and "fid" not in text and "fd |" not in text  # those are another checkpoint's
    assert Image.open(tmp_path / "older" / "samples.png").width > 100  # drawn for it


def test_an_export_can_be_exported_and_a_lone_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step-0000002").rename(tmp_path / "lone")
    main(Options(str(tmp_path / "lone"), str(tmp_path / "first")))
    main(Options(str(tmp_path / "first"), str(tmp_path / "second")))
    assert card(tmp_path / "first")[1].count("for 2 steps") == 1
    assert "Configuration" not in card(tmp_path / "second")[1]
