"""benchmarks/quality.py: the task that needs reach, models at matched sizes, and runs that may be cut anywhere."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import quality_cell, quality_curves, variants
from benchmarks.commands import DATA
from benchmarks.commands import QualityCurvesOptions as CurvesOptions
from benchmarks.quality import Options, main
from benchmarks.quality_data import TASKS, ReachTask
from benchmarks.quality_model import make_model
from benchmarks.reach_task import COLOUR, END, TIMES, FarEnds, agreement, best_guess, ends, reach_gained
from benchmarks.seams import seam_excess
from benchmarks.variants import OF_ANY_FAMILY, VARIANTS
from gspn_dit.errors import InputError
from gspn_dit.models import DiT
from gspn_dit.ops import propagate
from gspn_dit.options import parse
from gspn_dit.training.step import NonFiniteLoss

TINY = {
    "data": ["reach-32"],
    "models": ["dit", "gspn-dit+mixer=linear"],
    "seeds": 1,
    "width": 16,
    "depth": 2,
    "steps": 3,
    "batch_size": 2,
    "held_out": 3,
    "samples": 3,
    "inference_steps": 2,
    "device": "cpu",
}


def results(out: Path) -> dict[str, dict]:
    """Every finished result of a folder, without what differs between two equal runs."""
    found = {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("result.json")}
    return {name: {k: v for k, v in run.items() if k != "training_seconds"} for name, run in found.items()}


def far_ends(count: int) -> Tensor:
    """The first held-out images of the task that needs reach, (count, 3, 32, 32)."""
    return torch.stack([FarEnds(32, "test", count)[i][0] for i in range(count)])


def test_far_ends_agree_in_the_data_and_nowhere_else_do_two_rows():
    images = far_ends(200)
    assert agreement(images) == pytest.approx(1.0)
    assert ends(images).std() == pytest.approx(COLOUR, rel=0.05)
    assert images.count_nonzero() == 200 * 3 * 32 * 2 * END  # nothing between them
    for mixed in (images.roll(1, 0), images.roll(1, -2), images.roll(1, 1)):  # another image, row or colour at one end
        assert abs(agreement(torch.cat([images[..., :16], mixed[..., 16:]], dim=-1))) < 0.05


def test_far_ends_are_the_same_each_time_and_held_out_ones_are_others():
    first, again, other = FarEnds(32, "train", 8), FarEnds(32, "train", 8), FarEnds(32, "test", 8)
    assert all(torch.equal(first[i][0], again[i][0]) for i in range(8))
    assert not any(torch.equal(first[i][0], other[i][0]) for i in range(8))


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("reach", [False, True])
def test_no_other_guess_of_an_end_is_nearer_than_the_best_one(t, reach):
    """The posterior mean by brute force: prior times density of the noise, over a fine grid of colours."""
    images = far_ends(1)
    noisy = ends((1 - t) * images + t * torch.randn(images.shape)).double()
    colours = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    logs = -((noisy[..., None] - (1 - t) * colours) ** 2) / (2 * t**2)
    logs = logs.sum((-3, -2) if reach else -2, keepdim=True) - colours**2 / (2 * COLOUR**2)
    expected = (logs.softmax(-1) * colours).sum(-1)
    torch.testing.assert_close(best_guess(noisy, t, reach), expected.expand_as(noisy), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("reach", "gained"), [(False, 0.0), (True, 1.0)])
def test_the_best_guess_from_one_end_gains_no_reach_and_that_from_both_gains_all(reach, gained):
    images = far_ends(32)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def velocity(noisy: Tensor, t: float) -> Tensor:
        left, right = best_guess(ends(noisy), t, reach).unbind(-2)
        guess = torch.cat([left, torch.zeros_like(noisy[..., 2 * END :]), right], dim=-1)
        return (noisy - guess) / t

    assert reach_gained(velocity, images, noise) == pytest.approx(gained, abs=1e-4)
    assert reach_gained(lambda noisy, t: noisy / t, images, noise) < 0  # a guess that is grey


def test_models_have_the_same_width_and_depth_and_take_options():
    options = Options(width=128, depth=4)
    task = ReachTask(32)
    with torch.device("meta"):
        made = {spec: make_model(spec, task, options) for spec in (*options.models, "gspn-dit+chunk=8")}
    assert {model.config.width for model in made.values()} == {128}
    assert {spec: len(model.blocks) for spec, model in made.items()} == dict.fromkeys(made, 4) | {"gspn": 5}
    assert isinstance(made["dit"], DiT)
    assert made["gspn-dit+mixer=conv"].config.mixer == "conv"
    assert made["gspn-dit+chunk=8"].config.chunk == 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_another_model_that_trains(variant):
    task, options = ReachTask(32), Options(width=128, depth=2, models=["gspn-dit"])  # two groups
    inputs = (torch.randn(1, 3, 8, 8), torch.tensor([500.0]), torch.tensor([0]))
    outputs = []
    plain = "dit" if variant in OF_ANY_FAMILY else "gspn-dit"  # gspn-dit's labels are of unit scale already
    for spec in (plain, f"{plain}+variant={variant}"):
        torch.manual_seed(0)
        model = make_model(spec, task, options)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.autocast("cpu", torch.bfloat16):  # as the benchmark has it
            outputs.append(model(*inputs).float())
        outputs[-1].square().sum().backward()
    assert outputs[0].shape == outputs[1].shape and not torch.allclose(*outputs)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_two_directions_in_turn_are_rows_and_then_columns(monkeypatch):
    """Chunks and windows are as they were: 4 in the first layer of three, the whole map in the two others."""
    calls: list[tuple] = []

    def noted(*operands: Tensor, directions: tuple[str, ...], **options) -> Tensor:
        calls.append((directions, *(options.get(cut) for cut in ("chunk", "window", "shift"))))
        return propagate(*operands, directions=directions, **options)

    monkeypatch.setattr(variants, "propagate", noted)
    rows, columns = ("down", "up"), ("right", "left")
    for windows, first in ("null", (4, None, None)), ("shifted", (None, 4, 0)):
        spec = f"gspn-dit+chunk=4+windows={windows}+variant=two-directions"
        model = make_model(spec, ReachTask(32), Options(width=64, depth=3))
        model(torch.randn(1, 3, 8, 8), torch.tensor([500.0]), torch.tensor([0]))
        assert calls == [(rows, *first), (columns, None, None, None), (rows, None, None, None)]
        calls.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["sit"]}, "models='sit': wanted dit, gspn or gspn-dit"),
        ({"models": ["gspn-dit+linear"]}, "wanted option=value after the plus, not 'linear'"),
        ({"models": ["dit", "gspn-dit+mixer=mamba"]}, "mixer='mamba'"),
        ({"models": ["gspn-dit+reach=8"]}, "reach=8: gspn-dit-s-1 has no such option"),
        ({"models": ["dit+variant=gelu"]}, "wanted variants out of unit-labels$"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        main(Options(**TINY | options | {"out": str(tmp_path / "out")}))
    assert not (tmp_path / "out").exists()


def test_options_of_a_preset_can_be_changed_and_unknown_data_are_refused():
    options = parse(Options, ["--preset", "gpu", "--steps", "7"], exit_on_error=False)
    assert (options.steps, options.width, options.mixed_precision) == (7, 384, "auto")
    with pytest.raises(InputError, match=r"data='imagenet': wanted data sets out of digits, photos, reach-32"):
        parse(Options, ["--data", "[digits,imagenet]"], exit_on_error=False)


def test_the_data_sets_that_options_name_are_there_by_their_names():
    assert tuple(TASKS) == DATA
    assert [TASKS[name]().name for name in DATA] == list(DATA)


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_latents_of_real_images_are_about_unit_scale_and_decode_to_images(name):
    task = TASKS[name]()
    values, labels = zip(*(task.held_out[i] for i in range(0, 48, 3)), strict=True)
    noise = torch.randn(len(values), *task.latent_shape)
    latents = task.clean(torch.stack(values), noise)
    assert latents.shape[1:] == task.latent_shape
    assert 0.3 < latents.std() < 1.5
    assert max(labels) < task.num_classes
    assert task.images(latents).dtype == torch.uint8
    assert task.images(latents).shape[1] == 3


def test_a_seam_is_what_a_border_of_tokens_has_over_the_others():
    """Along both axes pixels rise by 9 within a token, by 1 or 3 in turn from one to the next, by 6 at the middle."""
    rises = torch.tensor([0, *[9, 1, 9, 3] * 4])[:16]
    rises[8] = 6
    line = rises.cumsum(0)
    images = (line[:, None] + line).expand(2, 3, 16, 16)
    others = torch.tensor([1.0, 3, 1, 1, 3, 1])
    excess = 6 - others.mean()
    assert seam_excess(images, 2, [4]) == pytest.approx(
        ((excess / others.mean()).item(), (excess / others.std()).item())
    )
    assert seam_excess(images, 2, [1, 4])[0] == pytest.approx(3.5 / 1.8 - 1)


def test_what_needs_no_vae_is_its_own_latents(tmp_path):
    values = torch.stack([TASKS["photos"]().train[i][0] for i in range(2)])
    latents = TASKS["photos"]().clean(values, torch.randn(2, 3, 64, 64))
    assert torch.equal(latents, values.float() / 127.5 - 1)
    assert torch.equal(ReachTask(32).clean(far_ends(2), torch.randn(2, 3, 32, 32)), far_ends(2))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_model_whose_loss_is_not_finite_is_left_and_the_others_are_trained(tmp_path, monkeypatch, capsys):
    def take_step(run, state, batches, step, stop, may_skip):
        if "mixer" not in run.config.model.overrides:
            raise NonFiniteLoss(f"the loss is nan at step {step}")
        return real(run, state, batches, step, stop, may_skip)

    real = quality_cell.take_step
    monkeypatch.setattr(quality_cell, "take_step", take_step)
    with pytest.raises(SystemExit, match=r"1 trainings failed: .*dit/seed-0: the loss is nan at step 1"):
        main(Options(**TINY, out=str(tmp_path)))
    assert "the rest is done" in capsys.readouterr().out
    assert set(results(tmp_path)) == {"reach-32/gspn-dit+mixer=linear/seed-0/result.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_cut_after_every_step_gives_the_figures_of_an_unbroken_one(tmp_path, capsys):
    main(Options(**TINY, out=str(tmp_path / "whole")))
    assert "all is done" in capsys.readouterr().out
    for calls in range(1, 20):
        main(Options(**TINY, out=str(tmp_path / "cut"), time_budget=1e-9))
        said = capsys.readouterr().out
        if calls == 4:  # three steps, and the evaluation
            assert set(results(tmp_path / "cut")) == {"reach-32/dit/seed-0/result.json"}
            assert "| dit |" in said and "| gspn-dit" not in said
        if "all is done" in said:
            break
    assert calls == 9  # two cells of four calls each, and one that finds nothing to do
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    for out in (tmp_path / "cut", tmp_path / "whole"):
        assert {path.name for path in out.iterdir()} == {
            "settings.json",
            "reach-32",
            "report.md",
            "losses.png",
            "samples-reach-32.png",
        }
        assert not list(out.rglob("checkpoints"))
    with pytest.raises(InputError, match=r"steps=4: .*begun with steps=3"):
        main(Options(**TINY | {"steps": 4}, out=str(tmp_path / "cut")))
    run = next(iter(results(tmp_path / "whole").values()))
    assert len(run["losses"]) == 3 and len(run["held_out_loss"]) == 10
    assert run["figures"].keys() == {"agreement", "reach_gained"}
    assert run["revision"] in (tmp_path / "whole" / "report.md").read_text()


CURVES = {
    "data": "reach-32",
    "models": ["dit", "gspn-dit+mixer=conv"],
    "preset": "cpu",
    "width": 16,
    "depth": 2,
    "batch_size": 2,
    "held_out": 2,
    "look_every": 2,
    "device": "cpu",
}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_training_that_goes_on_is_one_longer_training_and_all_models_are_compared(tmp_path, capsys):
    quality_curves.main(CurvesOptions(**CURVES, steps=5, out=str(tmp_path / "whole")))
    state = str(tmp_path / "state")  # handed over from one folder of results to the next
    for steps in (1, 3, 5):
        quality_curves.main(CurvesOptions(**CURVES, steps=steps, out=str(tmp_path / f"until-{steps}"), state=state))
    assert "gspn-dit+mixer=conv: from step 3 to 5" in capsys.readouterr().out
    whole, cut = (json.loads((tmp_path / name / "curves.json").read_text()) for name in ("whole", "until-5"))
    assert list(whole["rows"]) == CURVES["models"]
    for model, found in whole["rows"].items():
        other = cut["rows"][model]
        assert found["losses"] == other["losses"] and len(found["losses"]) == 5
        assert [(step, loss) for step, _, loss in found["curve"]] == [(step, loss) for step, _, loss in other["curve"]]
        assert [step for step, *_ in found["curve"]] == [2, 4]
    report = (tmp_path / "until-5" / "curves.md").read_text()
    assert "| held-out loss | at step 1 | at step 2 | at step 4 |" in report and whole["machine"] in report
    assert "Not every model was looked at yet." in (tmp_path / "until-1" / "curves.md").read_text()
    assert (tmp_path / "until-5" / "curves.png").stat().st_size > 0
    with pytest.raises(InputError, match=r"batch_size=3: .*begun with batch_size=2"):
        quality_curves.main(CurvesOptions(**CURVES | {"batch_size": 3}, steps=6, out=str(tmp_path / "x"), state=state))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_every_model_has_its_share_of_the_time(tmp_path):
    quality_curves.main(CurvesOptions(**CURVES, seconds=4, out=str(tmp_path)))
    rows = json.loads((tmp_path / "curves.json").read_text())["rows"]
    assert all(found["steps"] >= 1 and found["seconds"] < 6 for found in rows.values())


def test_losses_are_compared_at_the_same_step_and_at_the_same_time():
    slow, fast = [(100, 10.0, 1.0), (200, 20.0, 0.5)], [(100, 5.0, 1.2), (200, 10.0, 0.8), (400, 20.0, 0.4)]
    rows = {
        model: {"parameters": 10**6, "steps": curve[-1][0], "seconds": curve[-1][1], "curve": curve}
        for model, curve in {"slow": slow, "fast": fast}.items()
    }
    lines = quality_curves.tables(rows)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert table[3:6] == [
        ["held-out loss", "at step 50", "at step 100", "at step 200"],
        ["slow", "–", "1.0000", "0.5000"],
        ["fast", "–", "1.2000", "0.8000"],
    ]
    assert table[6:] == [
        ["held-out loss", "after 0.1 min", "after 0.2 min", "after 0.3 min"],
        ["slow", "–", "1.0000", "0.5000"],
        ["fast", "1.2000", "0.8000", "0.4000"],
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_is_read_from_its_files_plain_or_packed(tmp_path, packed):
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    for split in ("train", "t10k"):
        for name, shape, content in (
            ("images-idx3", (3, 28, 28), images),
            ("labels-idx1", (3,), torch.tensor([9, 0, 4], dtype=torch.uint8)),
        ):
            header = bytes([0, 0, 8, len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
            data = header + content.numpy().tobytes()
            path = tmp_path / f"{split}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    task = quality_curves.task_of(str(tmp_path))
    values, label = task.train[2]
    assert label == 4 and values.shape == task.latent_shape
    assert torch.equal(values[0, 2:-2, 2:-2], images[2]) and values.count_nonzero() == images[2].count_nonzero()
    (tmp_path / f"t10k-labels-idx1-ubyte{'.gz' if packed else ''}").unlink()
    with pytest.raises(InputError, match="wanted a folder with t10k-labels-idx1-ubyte or"):
        quality_curves.task_of(str(tmp_path))
