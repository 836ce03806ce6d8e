"""benchmarks/higher.py: what is drawn and compared, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import higher, higher_case
from benchmarks.higher import Options, crop, downsized, main
from benchmarks.higher_case import Case, draw
from gspn_dit.errors import InputError
from gspn_dit.evaluation.image_sets import ImageSet
from gspn_dit.options import parse
from gspn_dit.storage.pictures import load_image


@pytest.fixture
def options(tmp_path, monkeypatch) -> Options:
    """The packaged model at its own and twice its size, three images a row, drawn in this process; a made reference."""

    def made(name, size):
        return ImageSet(name, 30, size, lambda i: torch.full((3, *size), 8 * i, dtype=torch.uint8))

    monkeypatch.setattr(higher, "open_reference", made)
    monkeypatch.setattr(higher, "draw_in_process", lambda case, seconds: draw(case) or "ok")
    monkeypatch.setattr(higher_case, "peak_bytes", lambda device, call: len(call()))  # the other takes half a second
    return Options(
        models=["ours=digits"],
        pixels=[32, 64],
        features="digits",
        num_images=3,
        num_inference_steps=2,
        chunk_scale=False,
        images=str(tmp_path / "images"),
        out=str(tmp_path / "to" / "higher"),
    )


def test_rows_resume_and_other_settings_are_refused(options, monkeypatch):
    plots = []
    monkeypatch.setattr(higher, "plot", lambda results, path: plots.append(path) or path.touch())  # as does each
    main(options)
    results = higher.Results(options)
    rows = dict(results.rows)
    assert set(rows) == {"held out", "ours 32px", "ours 64px", "ours 64px shift"}
    own = rows["ours 32px"]
    assert own["fd_crops"] == own["fd_whole"]  # the image is its only crop, and its own size
    larger = [row for key, row in rows.items() if "64px" in key]
    assert len({row["fd_crops"] for row in larger}) == 2  # the switch changes the images
    assert all(row["fd_crops"] != row["fd_whole"] and row["seconds"] > 0 for row in larger)
    table = results.path.with_suffix(".md").read_text()
    assert table.count("| ours |") == 3 and table.count("×2") == 1
    assert len(plots) == 4 and results.path.with_suffix(".png").exists()

    shown = torch.from_numpy(load_image(results.path.with_name("higher-images.png"))).float()
    left, right = shown[shown.shape[0] // 2].chunk(2)  # an image each, not paper
    assert left.std() > 10 and right.std() > 10

    def stop(case, seconds):
        drawn.append(case)

    drawn = []
    monkeypatch.setattr(higher, "draw_in_process", stop)
    main(options)
    assert drawn == []
    saved = json.loads(results.path.read_text())
    del saved["rows"]["ours 64px"]
    results.path.write_text(json.dumps(saved))
    main(options)
    assert [(case.pixels, case.shift, case.chunk_scale) for case in drawn] == [(64, None, None)]
    with pytest.raises(InputError, match=r"seed=1: .*choose another --out"):
        main(dataclasses.replace(options, seed=1))


def test_the_plot_is_drawn_of_any_rows(options, tmp_path):
    results = higher.Results(options)
    results.rows |= {"held out": {"num_images": 4, "fd": 1.0}, "ours 64px shift": {"fd_crops": 3.0, "seconds": 1.0}}
    higher.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_row_keeps_its_images(tmp_path):
    case = Case("digits", 32, None, None, 3, 0, 1.0, 1, str(tmp_path))
    draw(case)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert len(files) == 3
    (tmp_path / "000001.png").unlink()
    draw(case)
    assert [path for path in files if path.stat().st_mtime_ns != files[path]] == [tmp_path / "000001.png"]
    costs = json.loads((tmp_path / "calls.json").read_text())
    assert [call["images"] for call in costs["calls"]] == [3, 1] and costs["peak"]["bytes"] > 0


def test_crops_are_native_pixels_from_all_over_and_the_same_each_time():
    image = np.arange(40 * 50, dtype=np.int64).reshape(40, 50, 1).repeat(3, axis=2)
    corners = set()
    for i in range(300):
        piece = crop(image, 32, 0, i)
        assert torch.equal(piece, crop(image, 32, 0, i))
        corner = int(piece[0, 0, 0])
        assert torch.equal(piece[0], torch.from_numpy(image[corner // 50 :, corner % 50 :, 0][:32, :32]))
        corners.add((corner // 50, corner % 50))
    assert {top for top, _ in corners} == set(range(9)) and {left for _, left in corners} == set(range(19))


def test_downsized_is_the_whole_image():
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, 32:] = 255
    small = downsized(image, 16)
    assert small.shape == (3, 16, 16) and small.dtype == torch.uint8
    assert (small[..., :6] == 0).all() and (small[..., -6:] == 255).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--pixels 30", "height=30: wanted a positive multiple of 4"),
        ("--features inception --models digits,other=nowhere", "nowhere"),
        ("--features digits --models random-gspn-dit", "features='digits': wanted features of 128 px images"),
        ("--models digits,random-dit", "models='random-dit': wanted models of one trained size"),
        ("--models digits,digits", "labels that differ"),
        ("--features digits --num-images 1", "--num-images=1"),
    ],
)
def test_refusals(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        main(
            parse(Options, ["--out", str(tmp_path / "out"), "--pixels", "64", *arguments.split()], exit_on_error=False)
        )
    assert list(tmp_path.iterdir()) == []
