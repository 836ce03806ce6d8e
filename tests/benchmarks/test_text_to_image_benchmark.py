"""benchmarks/text_to_image.py: what it counts, that it measures each thing once, and what it says of what fails."""

from __future__ import annotations

import json

import pytest
import torch
from made.stable_diffusion import tiny_sd, tiny_sdxl

from benchmarks import text_to_image, text_to_image_case, text_to_image_whole
from benchmarks.deadline import GO_ON
from benchmarks.text_to_image import Options, main
from benchmarks.text_to_image_case import LAYER, NOTHING, PROJECTIONS, RandomLayer, RandomUNet, Shape, counted
from gspn_dit.errors import InputError
from gspn_dit.models.macs import macs_of

MIXERS = ["gspn", "sdpa", "linear", "fresh", "window"]


@pytest.fixture
def tiny(monkeypatch):
    """Tiny UNets and a tiny pipeline in the places of the real ones."""
    makes = {"SD 1.5": tiny_sd, "SD-XL": tiny_sdxl}

    def make(name, device, dtype):
        return torch.nn.Module.to(makes[name](), device, dtype).requires_grad_(False)

    for module in (text_to_image_case, text_to_image_whole):
        monkeypatch.setattr(module, "random_unet", make)
    for encoder in (text_to_image_whole.FIRST_ENCODER, text_to_image_whole.SECOND_ENCODER):
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        for key, value in {**small, "projection_dim": 32}.items():
            monkeypatch.setitem(encoder, key, value)
    monkeypatch.setitem(text_to_image_whole.VAE, "block_out_channels", (32,) * 4)


def options(tmp_path, **changed):
    few = {"networks": ["SD-XL"], "sizes": ["128x192"], "dtype": "float32", "repeats": 2, "threads": 1}
    return Options(**{**few, "mixers": MIXERS, "out": str(tmp_path / "t2i"), **changed})


def rows_of(tmp_path):
    return json.loads((tmp_path / "t2i.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("name", "size", "macs", "quadratic", "bounds"),
    [
        ("SD-XL", (512, 512), "0.794", "3.0%", ("1.03", "1.22")),
        ("SD-XL", (1024, 1024), "3.381", "11.1%", ("1.13", "1.33")),
        ("SD-XL", (2048, 2048), "17.95", "33.5%", ("1.50", "1.78")),
        ("SD-XL", (4096, 4096), "143.9", "66.9%", ("3.02", "3.58")),
        ("SD 1.5", (512, 512), "0.402", "15.2%", ("1.18", "1.28")),
        ("SD 1.5", (1024, 1024), "2.337", "41.9%", ("1.72", "1.86")),
        ("SD 1.5", (2048, 2048), "21.10", "74.3%", ("3.89", "4.21")),
    ],
)
def test_multiplications_of_the_real_unets(name, size, macs, quadratic, bounds, on_meta):
    found = counted(on_meta(name), size)
    digits = len(macs.partition(".")[2])
    assert f"{found['sdpa'] / 1e12:.{digits}f}" == macs
    assert f"{1 - found[PROJECTIONS] / found['sdpa']:.1%}" == quadratic
    assert tuple(f"{found['sdpa'] / found[each]:.2f}" for each in (PROJECTIONS, NOTHING)) == bounds


@pytest.fixture(scope="module")
def on_meta():
    """The real UNets without weights, each made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = RandomUNet(name, Options(mixers=["sdpa"], memory="off"), "meta")
        return made[name]

    return make


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("network", ["SD 1.5", "SD-XL"])
def test_what_is_computed_of_attention_is_what_is_counted_of_it(tmp_path, network):
    made = RandomUNet(network, options(tmp_path, mixers=["sdpa"]), "meta")
    found = counted(made, (128, 192))
    with made.ready((128, 192)) as call:
        for variant in ("sdpa", PROJECTIONS):
            with made.standing(variant):
                assert macs_of(call) == 2 * found[variant]


def test_what_is_between_tokens_is_all_that_the_projections_lack():
    layer = RandomLayer(LAYER, Options(mixers=["sdpa"], dtype="float32"), "meta")
    tokens, channels = 16 * 32, 640
    macs = counted(layer, (256, 512))
    assert macs == {
        "sdpa": 4 * tokens * channels**2 + 2 * tokens**2 * channels,
        PROJECTIONS: 4 * tokens * channels**2,
        NOTHING: 0,
    }


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("network", ["SD 1.5", "SD-XL"])
def test_every_mixer_is_measured_once_and_the_same_command_measures_none_again(tmp_path, network, monkeypatch):
    main(options(tmp_path, networks=[network]))
    rows = rows_of(tmp_path)
    variants = [PROJECTIONS, *MIXERS, NOTHING]
    assert set(rows) == {f"{network}, 128x192, {each}" for each in ["counted", *variants]}
    for each in variants:
        row = rows[f"{network}, 128x192, {each}"]
        assert row["least"] <= row["seconds"] <= row["most"] and row["repeats"] == 2 and "bytes" in row
    report = (tmp_path / "t2i.md").read_text()
    assert f"## {network}, ms" in report and "| 128×192 |" in report and "Code: " in report
    monkeypatch.setattr(text_to_image, "subject", lambda *_: pytest.fail("measured again"))
    main(options(tmp_path, networks=[network]))
    assert rows_of(tmp_path) == rows


@pytest.mark.usefixtures("tiny")
def test_the_unet_is_as_it_was_after_each_variant(tmp_path):
    made = RandomUNet("SD-XL", options(tmp_path), "cpu")
    before = [module for _, module in made.unet.named_modules()]
    hooks = [len(module._forward_pre_hooks) for module in before]
    outputs = {}
    with torch.no_grad(), made.ready((128, 128)) as call:
        for variant in ["sdpa", PROJECTIONS, NOTHING, *MIXERS]:
            with made.standing(variant):
                call()
                standing = {type(place.block.attn1).__name__ for place in made.places.values()}
            outputs[variant] = standing
    assert all(mine is now for mine, (_, now) in zip(before, made.unet.named_modules(), strict=True))
    assert hooks == [len(module._forward_pre_hooks) for module in before]
    assert outputs["sdpa"] == {"Attention"} and outputs["gspn"] == {"GSPNAttention"}
    assert outputs[PROJECTIONS] == outputs[NOTHING] == {"Without"}


@pytest.mark.usefixtures("tiny")
def test_a_call_without_memory_is_a_result_and_the_others_go_on(tmp_path, monkeypatch):
    seconds_of, calls = text_to_image_case.seconds_of, []

    def second_fails(device, call):
        calls.append(call)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds_of(device, call)

    monkeypatch.setattr(text_to_image_case, "seconds_of", second_fails)
    main(options(tmp_path))
    rows = rows_of(tmp_path)
    assert rows["SD-XL, 128x192, gspn"]["error"] == "out of memory"
    assert "seconds" in rows["SD-XL, 128x192, sdpa"] and "out of memory" in (tmp_path / "t2i.md").read_text()


@pytest.mark.usefixtures("tiny")
def test_when_the_time_is_up_what_there_is_stays_and_the_rest_is_measured_next_time(tmp_path, capsys, monkeypatch):
    checks = iter([False] * 5)
    with monkeypatch.context() as patch:
        patch.setattr(text_to_image.Deadline, "passed", lambda self: next(checks, True))
        main(options(tmp_path))
    assert GO_ON in capsys.readouterr().out
    some = rows_of(tmp_path)
    assert 1 < len(some) < 2 + len(MIXERS)
    main(options(tmp_path))
    rows = rows_of(tmp_path)
    assert GO_ON not in capsys.readouterr().out
    assert len(rows) == 3 + len(MIXERS) and all(rows[key] == some[key] for key in some)


@pytest.mark.usefixtures("tiny")
def test_attention_that_would_take_too_long_is_put_together(tmp_path, monkeypatch):
    monkeypatch.setitem(text_to_image_case.RATE, "cpu", 1.0)
    main(options(tmp_path))
    row = rows_of(tmp_path)["SD-XL, 128x192, sdpa"]
    assert row["whole"] is False and row["seconds"] > 0
    table = (tmp_path / "t2i.md").read_text()
    assert "| ~" in table and "| gspn |" in table


@pytest.mark.usefixtures("tiny")
def test_the_stand_ins_note_every_self_attention(tmp_path):
    made = RandomUNet("SD-XL", options(tmp_path, mixers=["sdpa"]), "cpu")
    with torch.no_grad(), made.ready((128, 192)) as call, made.standing(PROJECTIONS):
        call()
    assert set(made.shapes) == {Shape(2, 8 * 12, 64, 4), Shape(2, 4 * 6, 96, 6)}
    assert sum(made.shapes.values()) == len(made.places)


def test_a_layer_is_measured_on_the_cpu(tmp_path):
    main(options(tmp_path, networks=None, sizes=["64x128"], repeats=1))
    assert {row["what"] for row in rows_of(tmp_path).values() if "seconds" in row} == {PROJECTIONS, *MIXERS, NOTHING}


@pytest.mark.usefixtures("tiny")
def test_an_image_is_generated_from_a_text_to_a_file(tmp_path, monkeypatch):
    written, write = [], text_to_image_whole.write_image

    def looked_at(pipe, latents, path):
        write(pipe, latents, path)
        written.append((tuple(latents.shape), path.stat().st_size))

    monkeypatch.setattr(text_to_image_whole, "write_image", looked_at)
    changed = {"end_to_end": True, "sizes": ["64x128"], "num_inference_steps": 1}
    main(options(tmp_path, **changed))
    ((shape, size),) = written
    row = rows_of(tmp_path)["SD-XL, 64x128, end to end"]
    assert shape == (4, 8, 16) and size > 0 and row["drawing"] > 0 and row["decoding"] > 0
    assert "## From a text to a file" in (tmp_path / "t2i.md").read_text()
    main(options(tmp_path, **changed))
    assert len(written) == 1


def test_the_pipeline_has_the_parts_of_sdxl_with_line_scans():
    asked = Options(dtype="bfloat16", end_to_end=True)
    asked.device = "meta"
    pipe = text_to_image_whole.random_pipeline(asked)
    millions = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6
        for name in ("vae", "text_encoder", "text_encoder_2")
    }
    assert {name: f"{count:.1f}" for name, count in millions.items()} == {
        "vae": "83.7",
        "text_encoder": "123.1",
        "text_encoder_2": "694.7",
    }
    assert pipe.vae.dtype == torch.float32 and pipe.unet.dtype == pipe.text_encoder_2.dtype == torch.bfloat16
    standing = [type(block.attn1).__name__ for block in pipe.unet.modules() if hasattr(block, "attn1")]
    assert standing == ["GSPNAttention"] * 70


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"networks": ["FLUX"]}, "networks='FLUX'"),
        ({"mixers": ["mamba"]}, "mixers='mamba'"),
        ({"sizes": ["1024"]}, "sizes=\\['1024'\\]"),
        ({"sizes": ["1000x1024"]}, "multiples of 64"),
        ({"repeats": 0}, "repeats=0"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, wrong, said):
    with pytest.raises(InputError, match=said):
        options(tmp_path, **wrong)


def test_a_gpu_is_asked_for_what_has_targets():
    on_gpu = Options(device="cuda", dtype="bfloat16")
    assert on_gpu.networks[0] == "SD-XL" and on_gpu.sizes[:4] == ["2048x2048", "4096x4096", "8192x8192", "8192x16384"]
    assert {"sdpa", "sdpa-cudnn"} <= set(on_gpu.mixers)
    assert Options(end_to_end=True).pixels == [(8192, 16384)]
