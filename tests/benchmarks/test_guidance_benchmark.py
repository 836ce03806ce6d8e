"""benchmarks/guidance.py: what is drawn and scored, and that it goes on where it stopped."""

import json

import pytest
import torch

from benchmarks import guidance
from benchmarks.guidance import Options, Results, main
from gspn_dit.errors import InputError
from gspn_dit.evaluation.image_sets import ImageSet


@pytest.fixture
def options(tmp_path, monkeypatch) -> Options:
    """Two ways of the packaged digits model, three images each of one step; a made reference."""

    def made(name, size):
        return ImageSet(name, 30, size, lambda i: torch.full((3, *size), 8 * i, dtype=torch.uint8))

    monkeypatch.setattr(guidance, "open_reference", made)
    monkeypatch.setattr(guidance, "WAYS", {name: guidance.WAYS[name] for name in ("none", "APG, η = 0")})
    return Options(
        data=["digits"],
        guides=["digits=digits"],
        num_images=3,
        threads=1,
        num_inference_steps=1,
        images=str(tmp_path / "images"),
        out=str(tmp_path / "to" / "guidance"),
    )


@pytest.mark.filterwarnings("ignore:.*rank-deficient")
def test_rows_resume_and_other_settings_are_refused(options, monkeypatch):
    main(options)
    rows = Results(options).rows
    assert list(rows) == ["digits: none", "digits: APG, η = 0", "digits: autoguidance by digits"]
    assert (
        rows["digits: autoguidance by digits"]["fd"] == rows["digits: none"]["fd"] != rows["digits: APG, η = 0"]["fd"]
    )
    table = Results(options).path.with_suffix(".md").read_text()
    assert table.count("| digits |") == 3 and "APG, η = 0 |" in table
    saved = json.loads(Results(options).path.read_text())
    del saved["rows"]["digits: none"]
    Results(options).path.write_text(json.dumps(saved))
    drawn = []
    monkeypatch.setattr(guidance, "draw", lambda *given, draw=guidance.draw: drawn.append(given[1]) or draw(*given))
    main(options)
    assert drawn == ["digits: none"] and Results(options).rows["digits: none"]["fd"] == rows["digits: none"]["fd"]
    options.seed = 1
    with pytest.raises(InputError, match="seed=1: wanted 0 as in"):
        main(options)


def test_guides_are_of_data_that_is_drawn():
    with pytest.raises(InputError, match=r"guides=\['photos=run'\]: wanted DATA=RUN"):
        Options(data=["digits"], guides=["photos=run"])
