"""Loading a pipeline and drawing with it: what that may import, and what it must do without."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made.runs import make_run

from gspn_dit import GSPNDiTPipeline
from gspn_dit.diffusion import image_generator
from gspn_dit.inference.loading import load_pipeline

WITHOUT = (
    "accelerate",
    "docstring_parser",
    "jsonargparse",
    "matplotlib",
    "mlxtend",
    "peft",  # where it is, diffusers imports it, and it asks for accelerate and transformers
    "skimage",
    "tensorboard",
    "torch_fidelity",
    "torchvision",
)
ROOMS = ("data", "evaluation", "training", "config", "commands", "options")  # of the package, which are not needed

PROGRAM = f"""
import sys

class Without:
    "An import finder as it is where some packages are not installed."
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WITHOUT}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)

import os
import diffusers.pipelines.pipeline_utils, torch  # once for all kinds: they take longer than the rest

def draw(kind, folder, out):
    from gspn_dit import GSPNDiTPipeline
    import numpy
    from gspn_dit.diffusion import image_generator
    from gspn_dit.inference.loading import load_pipeline

    pipe = (GSPNDiTPipeline.from_pretrained if kind == "from_pretrained" else load_pipeline)(folder)
    generators = [image_generator(0, i) for i in range(2)]
    images = pipe([0, 1], generator=generators, num_inference_steps=2, output_type="np").images
    numpy.save(out, images)
    loaded = sorted(name for name in sys.modules if name.split(".")[:1] == ["gspn_dit"])
    assert not [name for name in loaded if (name.split(".") + [""])[1] in {ROOMS}], loaded

for arguments in zip(*[iter(sys.argv[1:])] * 3):
    if os.fork() == 0:
        draw(*arguments)
        sys.exit()
    _, status = os.wait()
    assert status == 0, arguments
"""


@pytest.mark.slow
def test_a_pipeline_loads_and_draws_without_the_packages_of_training(tmp_path):
    """The same images as with them; and none of this package's modules for training is imported."""
    run = make_run(tmp_path / "run")
    load_pipeline(run).save_pretrained(tmp_path / "exported")
    folders = {"packaged": "digits", "run": run, "from_pretrained": tmp_path / "exported"}
    arguments = [str(each) for kind, folder in folders.items() for each in (kind, folder, tmp_path / f"{kind}.npy")]
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["gspn_dit"].__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, folder in folders.items():
        pipe = GSPNDiTPipeline.from_pretrained(folder) if kind == "from_pretrained" else load_pipeline(folder)
        generators = [image_generator(0, i) for i in range(2)]
        here = pipe([0, 1], generator=generators, num_inference_steps=2, output_type="np").images
        np.testing.assert_array_equal(np.load(tmp_path / f"{kind}.npy"), here)
