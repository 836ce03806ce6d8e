"""The command `generate_t2i.py`, run as a person runs it: texts to images by tiny pipelines, and its refusals."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from made.launched import finish, launch
from made.stable_diffusion import tiny_sd, tiny_sd_pipeline, tiny_sdxl_pipeline
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from gspn_dit import replace_self_attention
from gspn_dit.commands import GenerateOptions
from gspn_dit.data.captions import open_captioned
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.inference.decoding import decode_images
from gspn_dit.inference.generate import Drawing, main
from gspn_dit.inference.generated_folder import begin, keep_latents, kept_stages
from gspn_dit.inference.prompts import encode_prompts
from gspn_dit.inference.stages import Stage, enlarged, ladder, stage_noise
from gspn_dit.inference.text_to_image import load_text_to_image, sha256_of_parts
from gspn_dit.inference.unet_sampling import draw_latents
from gspn_dit.options import command
from gspn_dit.text.teacher import load_teacher

SCRIPT = Path(__file__).parents[2] / "generate_t2i.py"
FEW = ("--num-inference-steps", "2")


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny_sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sdxl"
    tiny_sdxl_pipeline().save_pretrained(folder)
    return folder


def run(*arguments: object) -> None:
    argv = [*map(str, arguments), *("" if "--device" in arguments else ("--device", "cpu")), "--mixed-precision", "no"]
    command(main, GenerateOptions, prog="generate_t2i.py", argv=argv, positional=("prompt",), continues=True)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_without_a_ladder_it_is_the_plain_pipeline(kind, request, tmp_path):
    """Byte for byte, from the same noise, with and without a negative prompt."""
    folder = request.getfixturevalue(kind)
    pipe = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}[kind](tmp_path / "pipe")
    for more in ({}, {"negative_prompt": "grey"}):
        wanted = pipe(
            ["a red 3", "a blue 7"],
            height=40,
            width=24,
            num_inference_steps=2,
            generator=[image_generator(5, i) for i in range(2)],
            output_type="pil",
            **{name: [text] * 2 for name, text in more.items()},
        ).images
        out = tmp_path / f"with{len(more)}"
        words = [word for name, text in more.items() for word in (f"--{name.replace('_', '-')}", text)]
        run(
            "a red 3",
            "a blue 7",
            "--model",
            folder,
            *FEW,
            *("--height", 40, "--width", 24, "--seed", 5),
            *words,
            "--out",
            out,
        )
        assert np.abs(pictures(out) - np.stack([np.asarray(image) for image in wanted])).max() == 0
    assert len(np.unique(pictures(tmp_path / "with0")[0] - pictures(tmp_path / "with1")[0])) > 1


@pytest.mark.parametrize(
    "kind", [PNDMScheduler, HeunDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_latents_are_the_pipelines_with_any_sampler(kind):
    pipe = tiny_sd_pipeline()
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    generators = [image_generator(1, i) for i in range(2)]
    wanted = pipe(["a 3", "a 7"], generator=generators, num_inference_steps=3, output_type="latent").images
    assert torch.equal(drawing(pipe, steps=3, seed=1).draw(0, [0, 1], ["a 3", "a 7"], None, lambda: None), wanted)


def test_sizes_whose_levels_round_up(sd, sdxl, tmp_path):
    for model in (sd, sdxl):
        run("a 3", "--model", model, *FEW, "--height", 34, "--width", 26, "--out", tmp_path / model.name)
        assert pictures(tmp_path / model.name).shape == (1, 34, 26, 3)


def drawing(pipe, steps=4, seed=0, guidance_scale=7.5, memory="off", size=32, **more) -> Drawing:
    stages = ladder(Stage(size, size, steps), 2, **{"upscale": [], "strengths": None, "steps": None} | more)
    return Drawing(pipe, stages, guidance_scale, None, seed, memory)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_stage_of_the_ladder_is_image_to_image_of_diffusers(kind):
    """From the same latents and the same noise; every step, also of samplers that remember steps."""
    pipe = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}[kind]()
    image_to_image = {"sd": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}[kind]
    other = image_to_image(**pipe.components)
    other.set_progress_bar_config(disable=True)
    for sampler in (type(pipe.scheduler), DPMSolverMultistepScheduler):
        pipe.scheduler = other.scheduler = sampler.from_config(pipe.scheduler.config)
        ours = drawing(pipe, steps=8, upscale=[1.5], strengths=[0.5])
        first = ours.draw(0, [3], ["a 7"], None, lambda: None)
        steps = iter(range(9))
        last = ours.draw(1, [3], ["a 7"], first, partial(next, steps))
        begin = enlarged(pipe.vae, first, (48, 48))
        sizes = {} if kind == "sd" else {"original_size": (48, 48), "target_size": (48, 48)}
        wanted = other(
            ["a 7"],
            image=begin,
            strength=0.5,
            num_inference_steps=8,
            guidance_scale=7.5,
            generator=[stage_noise(0, 3, 1)],
            output_type="latent",
            **sizes,
        ).images
        assert last.shape == (1, 4, 24, 24) and next(steps) == ours.steps(1) == 4
        torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-5)


def test_strength_is_how_much_is_drawn_anew(sd):
    pipe = load_text_to_image(str(sd))
    first, changes = None, []
    for strength in (0.1, 0.5, 1.0):
        ours = drawing(pipe, steps=10, upscale=[2], strengths=[strength])
        first = ours.draw(0, [0], ["a 7"], None, lambda: None)
        begin = enlarged(pipe.vae, first, (64, 64))
        changes.append(float((ours.draw(1, [0], ["a 7"], first, lambda: None) - begin).pow(2).mean()))
    assert changes == sorted(changes) and changes[2] > 4 * changes[0]


def test_an_enlarged_image_is_that_image():
    pipe = tiny_sd_pipeline()
    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    large = enlarged(pipe.vae, latents, (48, 32))
    images = decode_images(pipe.vae, latents, "pil")
    assert large.shape == (2, 4, 24, 16)
    for image, each in zip(images, large, strict=True):
        pixels = torch.from_numpy(np.array(image.resize((32, 48), Image.Resampling.LANCZOS))).permute(2, 0, 1)[None]
        mean = pipe.vae.encode(pixels / 127.5 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        torch.testing.assert_close(each[None], mean, rtol=1e-4, atol=1e-4)


def test_an_image_depends_on_the_seed_and_its_number_alone(sd, tmp_path):
    """Not on the batch size, nor on the images beside it; also through a ladder."""
    more = ("--upscale", "2x", "--strength", "0.5")
    texts = ("a red 3", "a blue 7")
    for name, batch, count, seed in (("one", 1, 2, 0), ("four", 4, 2, 0), ("other", 4, 2, 1)):
        arguments = ("--num-images", count, "--batch-size", batch, "--seed", seed, "--out", tmp_path / name)
        run(*texts, "--model", sd, *FEW, *more, *arguments)
    one, four, other = (pictures(tmp_path / name) for name in ("one", "four", "other"))
    assert one.shape == (4, 64, 64, 3)
    assert np.abs(one - four).max() <= 1
    assert all(np.abs(a - b).max() > 1 for a, b in [(one[0], one[1]), (one[2], one[3]), (one[0], other[0])])


def test_noise_of_stages_and_images_differs():
    draws = [torch.randn(4, generator=stage_noise(0, i, stage)) for i in range(3) for stage in range(3)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 9
    assert torch.equal(draws[3], torch.randn(4, generator=image_generator(0, 1)))


def test_a_file_of_prompts_and_a_folder_of_images(sd, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text('# digits\na red "3", big\n\n  a blue 7 ✨\n', encoding="utf-8")
    out = tmp_path / "new" / "images"
    run("a 🐈, sitting", "--prompts", tmp_path / "prompts.txt", "--model", sd, *FEW, "--out", f"{out}/")
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = ["a 🐈, sitting", 'a red "3", big', "a blue 7 ✨"]
    assert rows == [{"file_name": f"00000{i}.png", "text": text} for i, text in enumerate(texts)]
    assert sorted(path.name for path in out.iterdir()) == [f"00000{i}.png" for i in range(3)] + [
        "metadata.jsonl",
        "settings.json",
    ]
    captioned = open_captioned(out, 16)
    assert [captioned.caption(i) for i in range(3)] == texts, "it is a folder of captioned pictures"
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"3 images: {out}/"
    assert "generating: 6 steps" in printed.err


def test_one_picture_of_one_image_or_a_grid(sd, tmp_path):
    run("a 3", "--model", sd, *FEW, "--out", tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size == (32, 32)
    run("a 3", "--num-images", 3, "--model", sd, *FEW, "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").height > 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "one.png"]


def test_a_cut_command_goes_on_between_the_stages(sd, tmp_path, monkeypatch, capsys):
    """The stages that are through are not drawn again; the images are those of a command that was not cut."""
    command_line = ("a 3", "a 7", "--model", sd, *FEW, "--upscale", "2x,1.5x", "--strength", "0.5", "--batch-size", 2)
    run(*command_line, "--out", tmp_path / "whole")
    out, draw, drawn = tmp_path / "cut", Drawing.draw, []

    def cut(self, number, images, *more):
        if number == 2 and images == [1]:
            raise KeyboardInterrupt
        return draw(self, number, images, *more)

    def noted(self, number, images, *more):
        drawn.append((number, images))
        return draw(self, number, images, *more)

    monkeypatch.setattr(Drawing, "draw", cut)
    with pytest.raises(SystemExit) as stopped:
        run(*command_line, "--out", out)
    assert stopped.value.code == 130
    assert "the same command goes on here" in capsys.readouterr().err
    kept = [".000000.stage2.safetensors", ".000001.stage1.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == [*kept, "metadata.jsonl", "settings.json"]
    monkeypatch.setattr(Drawing, "draw", noted)
    run(*command_line, "--out", out)
    assert drawn == [(2, [1])]
    assert "generating: 8 steps, 1 of them" in capsys.readouterr().err  # 2 + 1 + 1 of each image
    assert sorted(path.name for path in out.iterdir()) == [
        "000000.png",
        "000001.png",
        "metadata.jsonl",
        "settings.json",
    ]
    assert np.abs(pictures(out) - pictures(tmp_path / "whole")).max() <= 1
    run(*command_line, "--out", out)  # nothing is left to do
    assert drawn == [(2, [1])]


def test_more_prompts_go_on_and_others_are_refused(sd, tmp_path, capsys):
    out = ("--model", sd, *FEW, "--out", tmp_path / "images")
    run("a 3", *out)
    first = pictures(tmp_path / "images")
    run("a 3", "a 7", *out)
    assert np.array_equal(pictures(tmp_path / "images")[:1], first)
    for words, said in (
        (("a 4", "a 7"), "was begun with 'a 3' for 000000.png"),
        (("a 3", "a 7", "--seed", 1), "was begun with seed=0"),
        (("a 3", "a 7", "--upscale", "2x", "--strength", "0.5"), "was begun with stages="),
        (("a 3",), "PNGs of another run would stay there (000001.png"),
    ):
        with pytest.raises(SystemExit):
            run(*words, *out)
        assert said in capsys.readouterr().err.splitlines()[-1]
    settings = json.loads((tmp_path / "images" / "settings.json").read_text())
    assert settings["stages"] == [{"height": 32, "width": 32, "num_inference_steps": 2, "strength": 1.0}]
    assert settings["guidance_scale"] == 7.5


def test_saving_memory_gives_the_same_image(sdxl, tmp_path):
    for memory in ("on", "off"):
        run(
            "a 3",
            "--model",
            sdxl,
            *FEW,
            "--upscale",
            "2x",
            "--strength",
            "0.5",
            "--memory",
            memory,
            "--out",
            tmp_path / memory,
        )
    assert np.abs(pictures(tmp_path / "on") - pictures(tmp_path / "off")).max() <= 1


def test_replacement_layers_are_mounted_from_their_folder(sdxl, sd, tmp_path, capsys):
    """The images are those of the pipeline that they are mounted on by hand; another model refuses them."""
    pipe = load_text_to_image(str(sdxl))
    layers = replace_self_attention(pipe, seed=3)
    layers.save_pretrained(tmp_path / "layers")
    words = ("a 3", "--replacement", tmp_path / "layers", *FEW, "--seed", 2, "--out", tmp_path / "images")
    run(*words, "--model", sdxl)
    layers.mount(pipe)
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe("a 3", num_inference_steps=2, generator=image_generator(2, 0)).images
    assert np.array_equal(pictures(tmp_path / "images")[0], np.asarray(image))
    capsys.readouterr()
    for more, said in (
        (("--model", sd), "layers': the U-Net has no self-attention "),
        (("--model", sdxl, "--replacement", sdxl / "unet"), "--replacement="),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*words, *more)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and said in line


@pytest.mark.slow
def test_processes_share_the_images_and_as_a_person_runs_it(sd, tmp_path):
    words = ("a 3", "a 7", "--num-images", 2, "--model", sd, *FEW, "--upscale", "2x", "--strength", "0.5")
    words = (*words, "--batch-size", 1, "--out")
    printed = finish(launch(2, SCRIPT, "--mixed-precision", "no", *words, tmp_path / "two"))
    assert "generating: 12 steps" in printed and "4 images: " in printed
    run(*words, tmp_path / "one")
    assert np.abs(pictures(tmp_path / "one") - pictures(tmp_path / "two")).max() <= 1


def test_as_many_pixels_at_a_time_in_every_stage():
    ours = drawing(tiny_sd_pipeline(), upscale=[2, 2])
    assert [ours.together(number, 9) for number in range(3)] == [9, 2, 1]


@pytest.fixture(scope="module")
def unfit(tmp_path_factory) -> Path:
    """A folder with files that the command refuses."""
    folder = tmp_path_factory.mktemp("unfit")
    (folder / "empty.txt").write_text("# none\n")
    tiny_sd_pipeline(unet=tiny_sd(in_channels=9)).save_pretrained(folder / "inpainting")
    tiny_sd_pipeline(unet=tiny_sd(sample_size=None)).save_pretrained(folder / "sizeless")
    (folder / "list").mkdir()
    (folder / "list" / "model_index.json").write_text("[1]")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--prompt: missing; wanted a text in quotes, or --prompts with a file of them"),
        ("--prompts nowhere.txt", "--prompts='nowhere.txt': cannot be read (No such file or directory)"),
        ("--prompts empty.txt", "--prompts='empty.txt': has no prompts; wanted one a line"),
        ("a --model nowhere", "--model='nowhere': no such folder, and no model of that name in the hub's cache"),
        ("a --model owner/nowhere", "--model='owner/nowhere': no such folder, and no model of that name in the hub"),
        ("a --model .", ": no readable model_index.json there; wanted a folder that a diffusers pipeline was saved to"),
        ("a --model inpainting", "its UNet takes 9 channels, and its latents have 4"),
        ("a --model sizeless", "its UNet does not say the size that it was made for; write sample_size"),
        ("a --model list", ": no readable model_index.json there; wanted a folder that a diffusers pipeline was"),
        ("a --model transformer", "a PixArtAlphaPipeline; wanted StableDiffusionPipeline or StableDiffusionXLPipeline"),
        (
            "a --replacement nowhere",
            "--replacement='nowhere': no readable config.json there; wanted a folder that an Attention",
        ),
        ("a --height 33", "height and width: 32×33 pixels; wanted multiples of 2, the VAE's factor"),
        ("a --height 0", "--height=0: wanted 1 or more"),
        ("a --upscale 2x,big", "--upscale=['2x', 'big']: wanted factors above 1, as in 2x,1.5x"),
        ("a --upscale 1x", "wanted factors above 1, as in 2x,1.5x"),
        ("a --upscale 1.3x", "--upscale=[1.3]: 32×32 pixels become 41.6×41.6; wanted whole sides"),
        ("a --upscale 2x --strength 0", "--strength=[0.0]: wanted numbers above 0, up to 1"),
        ("a --upscale 2x --strength 1.5", "--strength=[1.5]: wanted numbers above 0, up to 1"),
        ("a --upscale 2x --strength 0.3,0.2", "wanted one value, or one for each of the 1 stages"),
        ("a --strength 0.3", "--strength=[0.3]: there is no further stage; give --upscale"),
        ("a --upscale 2x --strength 0.1 --upscale-steps 5", "--strength=0.1: of 5 steps it takes none"),
        ("a --upscale 2x --upscale-steps 0", "--upscale-steps=[0]: wanted 1 or more"),
        ("a --upscale 2x --upscale-steps 5000", "--upscale-steps=5000: DDIMScheduler takes 1 to 1000"),
        ("a --num-inference-steps 5000", "--num-inference-steps=5000: DDIMScheduler takes 1 to 1000"),
        ("a --guidance-scale 0.5", "--guidance-scale=0.5: wanted 1 (none) or more"),
        (
            "a --negative-prompt b --guidance-scale 1",
            "--negative-prompt='b': there is no guidance to lead away from it",
        ),
        ("a --num-images 0", "--num-images=0: wanted 1 or more"),
        ("a --batch-size 0", "--batch-size=0: wanted 1 or more"),
        ("a --seed -1", "--seed=-1: wanted 0 or more"),
        ("a --memory some", "--memory='some': wanted auto, on or off"),
        ("a --out picture.jpg", "--out='picture.jpg': wanted a .png file or a folder"),
        ("a --device abacus", "--device='abacus'"),
        ("a --height 4000000 --width 4000000", "stage 1 of 4000000×4000000 pixels, 1 at a time: over 3"),
    ],
)
def test_refusals(sd, unfit, monkeypatch, capsys, words, said):
    monkeypatch.chdir(unfit)
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*words.split(), *(() if "--model" in words else ("--model", sd)))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("generate_t2i.py: error: ") and said in line
    assert sorted(Path().rglob("*")) == before


def test_a_model_is_asked_for_while_none_is_packaged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("a 3")
    assert "--model: missing; wanted a folder that a pipeline" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_said(sd, tmp_path, capsys, monkeypatch):
    """Once, and not by diffusers for every batch of every stage."""
    theirs, of_diffusers = logging.getLogger(StableDiffusionPipeline.__module__), []
    monkeypatch.setattr(theirs, "handle", of_diffusers.append)
    run("x" * 100, "a 3", "--negative-prompt", "y" * 90, "--model", sd, *FEW, "--out", tmp_path / "images")
    said = capsys.readouterr().err
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    texts = ("x" * 100, "y" * 90)
    assert warnings == [f"warning: longer than the model reads, which leaves off its end: {text!r}" for text in texts]
    assert "indexing errors" not in said and not of_diffusers


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_vae_stays_in_float32_and_the_rest_is_converted(sdxl):
    pipe = load_text_to_image(str(sdxl), dtype=torch.bfloat16)
    assert (pipe.vae.dtype, pipe.unet.dtype, pipe.text_encoder_2.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    condition, null = encode_prompts(pipe, ["a 3"], None, guided=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"image_size": (16, 16), "num_inference_steps": 2, "guidance_scale": 3.0}
    latents = draw_latents(pipe.unet, pipe.scheduler, noise, condition, null, **options)
    assert latents.dtype == torch.float32 and latents.isfinite().all()


@pytest.mark.parametrize("unfit", [True, False])
def test_the_models_safety_checker_is_asked(unfit, tmp_path, capsys):
    """It compares cosines with thresholds: of -2 it finds every image unfit, of 2 none."""
    pipe = tiny_sd_pipeline()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    config = CLIPConfig(vision_config=vision | {"num_attention_heads": 4}, text_config=text, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.fill_(-2 if unfit else 2)
    small = {"shortest_edge": 32}
    reader = CLIPImageProcessor(size=small, crop_size={"height": 32, "width": 32})
    pipe.register_modules(safety_checker=checker, feature_extractor=reader)
    pipe.save_pretrained(tmp_path / "model")
    run("a 3", "--model", tmp_path / "model", *FEW, "--out", tmp_path / "seen")
    assert ("000000.png is black" in capsys.readouterr().err) == unfit
    assert (pictures(tmp_path / "seen").max() == 0) == unfit


def test_latents_of_a_prompt_that_is_left_out_are_not_anothers(sd, tmp_path, monkeypatch):
    """Cut between stages with two prompts, cut again with one of them, and then given with another second prompt."""
    more = ("--model", sd, *FEW, "--upscale", "2x", "--strength", "0.5", "--batch-size", 2, "--out")
    draw = Drawing.draw

    def cut(self, number, *rest):
        if number:
            raise KeyboardInterrupt
        return draw(self, number, *rest)

    with monkeypatch.context() as cutting:
        cutting.setattr(Drawing, "draw", cut)
        for texts in (("a 3", "a 7"), ("a 3",)):
            with pytest.raises(SystemExit):
                run(*texts, *more, tmp_path / "cut")
    run("a 3", "the other", *more, tmp_path / "cut")
    run("a 3", "the other", *more, tmp_path / "whole")
    assert np.abs(pictures(tmp_path / "cut") - pictures(tmp_path / "whole")).max() <= 1


def test_images_without_their_prompts_are_not_gone_on_with(tmp_path):
    begin(tmp_path, {}, ["a 3", "a 7"])
    (tmp_path / "000000.png").touch()
    for damaged in ("{", "[]\n", "3\n", '{"file_name": "000000.png"}\n'):
        (tmp_path / "metadata.jsonl").write_text(damaged)
        with pytest.raises(InputError, match=r"metadata\.jsonl is damaged"):
            begin(tmp_path, {}, ["a 3", "a 7"])
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"holds images without the metadata\.jsonl"):
        begin(tmp_path, {}, ["a 3", "a 7"])


def test_a_hidden_image_of_a_prompt_that_is_left_out_is_not_anothers(tmp_path):
    begin(tmp_path, {}, ["a 3", "a 7"])
    (tmp_path / "000001.png").touch()
    with pytest.raises(InputError, match=r"holds 000001\.png of another prompt"):
        begin(tmp_path, {}, ["a 3"])


def test_latents_of_a_finished_image_go(tmp_path):
    """A command that was cut after the image was written and before they were removed."""
    begin(tmp_path, {}, ["a 3", "a 7"])
    keep_latents(tmp_path, 0, 1, torch.zeros(4, 2, 2))
    keep_latents(tmp_path, 1, 1, torch.zeros(4, 2, 2))
    (tmp_path / "000000.png").touch()
    assert begin(tmp_path, {}, ["a 3", "a 7"]) == [1]
    assert kept_stages(tmp_path) == {1: 1}


def test_replacement_layers_may_move_but_not_change(sd, tmp_path, capsys):
    """The same weights in another folder go on; with other chunks, which are no weights, they are other layers."""
    for name, chunk, seed in (("layers", 4, 3), ("moved", 4, 3), ("other", 2, 3), ("weights", 4, 4)):
        replace_self_attention(tiny_sd(), seed=seed, chunk=chunk).save_pretrained(tmp_path / name)
    words = ("--model", sd, *FEW, "--out", tmp_path / "images", "--replacement")
    run("a 3", *words, tmp_path / "layers")
    run("a 3", "a 7", *words, tmp_path / "moved")
    assert len(pictures(tmp_path / "images")) == 2
    capsys.readouterr()
    for name, said in (("other", "replacement_config_sha256="), ("weights", "replacement_sha256=")):
        with pytest.raises(SystemExit):
            run("a 3", "a 7", *words, tmp_path / name)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"was begun with {said}" in line


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: halve(model / "text_encoder" / "model.safetensors"),
        lambda model: halve(model / "unet" / "diffusion_pytorch_model.safetensors"),
        lambda model: halve(model / "unet" / "config.json"),
        lambda model: halve(model / "tokenizer" / "tokenizer_config.json"),
        lambda model: (model / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model"}'),
    ],
    ids=["text encoder", "unet", "config", "tokenizer", "sizes"],
)
def test_damaged_files_are_said_to_be_it(sd, tmp_path, damage):
    """By `generate`, and of the same folder as a teacher."""
    model = shutil.copytree(sd, tmp_path / "model")
    damage(model)
    for load, argument in ((load_text_to_image, "model"), (load_teacher, "base")):
        with pytest.raises(InputError, match=f"^{argument}=.*: its files cannot be read "):
            load(str(model))


def test_damaged_layers_are_said_to_be_it(sd, tmp_path):
    layers = tmp_path / "layers"
    replace_self_attention(tiny_sd(), layers="mid_block").save_pretrained(layers)
    halve(layers / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"^replacement=.*: its files cannot be read "):
        load_text_to_image(str(sd), str(layers))
    halve(layers / "config.json")
    with pytest.raises(InputError, match=r"^replacement=.*: no readable config\.json there"):
        load_text_to_image(str(sd), str(layers))


@pytest.mark.parametrize(
    "fault", [RuntimeError("CUDA error: device-side assert"), TypeError("unexpected keyword"), AttributeError("dtype")]
)
def test_what_is_no_damage_is_not_taken_for_it(sd, monkeypatch, fault):
    def fail(*arguments: object, **options: object) -> None:
        raise fault

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", fail)
    for load in (load_text_to_image, load_teacher):
        with pytest.raises(type(fault)) as raised:
            load(str(sd))
        assert raised.value is fault


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: edited(model / "unet" / "config.json", attention_head_dim=2), {"unet_config"}),
        (lambda model: edited(model / "vae" / "config.json", scaling_factor=0.2), {"vae_config"}),
        (lambda model: edited(model / "text_encoder" / "config.json", hidden_act="gelu"), {"text_encoder_config"}),
        (lambda model: edited(model / "model_index.json", requires_safety_checker=True), {"pipeline_config"}),
        (lambda model: tiny_sd(seed=1).save_pretrained(model / "unet"), {"unet"}),
        (lambda model: edited(model / "unet" / "config.json", _diffusers_version="0.1"), set()),
    ],
    ids=["unet/config", "vae/config", "text_encoder/config", "pipeline", "unet", "version"],
)
def test_what_decides_the_images_is_told_apart_by_part(sd, tmp_path, change, said):
    model = shutil.copytree(sd, tmp_path / "model")
    before = sha256_of_parts(load_text_to_image(str(model)), str(model))
    change(model)
    after = sha256_of_parts(load_text_to_image(str(model)), str(model))
    assert {name.removesuffix("_sha256") for name in before if before[name] != after[name]} == said


def test_layers_are_told_apart_from_the_network_that_they_are_mounted_on(sd, tmp_path):
    """What they take the place of draws nothing, and may be anything."""
    replace_self_attention(tiny_sd(), seed=3).save_pretrained(tmp_path / "layers")
    model, layers = shutil.copytree(sd, tmp_path / "model"), str(tmp_path / "layers")
    pipe = load_text_to_image(str(model), layers)
    before = sha256_of_parts(pipe, str(model), layers)
    other = load_text_to_image(str(model))
    with torch.no_grad():
        other.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(1)
    other.unet.save_pretrained(model / "unet")
    assert sha256_of_parts(load_text_to_image(str(model), layers), str(model), layers) == before
    pipe.tokenizer.pad_token = "!"
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(1)
    after = sha256_of_parts(pipe, str(model), layers)
    assert {name for name in before if before[name] != after[name]} == {"replacement_sha256", "tokenizer_sha256"}


def test_a_factor_is_taken_as_it_is_written():
    """200 · 1.1 is 220, though not of floats."""
    assert [stage.size for stage in ladder(Stage(200, 400, 50), 4, [1.1], None, None)] == [(200, 400), (220, 440)]
