"""What sampling reads of a run's configuration: no other defaults than the trainer's, and no damage unsaid."""

import dataclasses

import pytest
import yaml
from made.runs import make_run

from gspn_dit.config import Config
from gspn_dit.errors import InputError
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.inference.run_description import RunDescription
from gspn_dit.storage.run_folder import RunFolder


def test_the_defaults_are_the_trainers():
    assert RunDescription.of({}) == RunDescription.of(dataclasses.asdict(Config()))


def test_a_run_of_before_an_option_and_one_of_after_it_load(tmp_path):
    run = make_run(tmp_path / "run")
    config = RunFolder(run).newest_checkpoint().config
    values = yaml.safe_load(config.read_text())
    del values["sampling"]["guidance_interval"], values["diffusion"]["class_dropout"]
    config.write_text(yaml.safe_dump(values | {"of_a_later_version": {"sharpness": 3}}))
    pipe = load_pipeline(run)
    assert (pipe.config.guidance_interval, pipe.config.class_dropout) == ([0.0, 1.0], 0.1)
    assert (pipe.config.guidance_scale, pipe.config.num_inference_steps) == (2.0, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sampling: {num_inference_steps: many}", "sampling.num_inference_steps='many': wanted 1 or more"),
        ("sampling: {guidance_scale: 0}", "sampling.guidance_scale=0: wanted 1"),
        ("sampling: {guidance_interval: [0.5]}", "sampling.guidance_interval="),
        ("sampling: {sampler: 3}", "sampler=3"),
        ("diffusion: {class_dropout: 2}", "diffusion.class_dropout=2: wanted a share from 0 to 1"),
        ("diffusion: {objective: gan}", "objective='gan'"),
        ("data: {vae: [1]}", r"data.vae=\[1\]"),
        ("diffusion: 3", "diffusion=3: wanted a section of options"),
        ("diffusion: [", "is damaged"),
        ("just words", "holds str; wanted a run's options"),
    ],
)
def test_a_damaged_configuration_is_said_in_one_line(tmp_path, text, words):
    run = make_run(tmp_path / "run")
    config = RunFolder(run).newest_checkpoint().config
    values = yaml.safe_load(config.read_text())
    given = None if text[-1] == "[" or text == "just words" else yaml.safe_load(text)
    for section, options in (given or {}).items():
        values[section] = values[section] | options if isinstance(options, dict) else options
    config.write_text(yaml.safe_dump(values) if given else text)
    with pytest.raises(InputError, match=words) as error:
        load_pipeline(run)
    assert str(error.value).startswith(f"model={str(run)!r}: ") and "\n" not in str(error.value)
