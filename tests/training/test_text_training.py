"""gspn-t2i trains by the same loop: on captions as they come, or stored, with an encoder of its own or a frozen one."""

import json
import os
import shutil

import pytest
import torch
import yaml
from made.captions import CAPTIONS, write_captioned, write_text_encoder
from made.training import ROOT, config, losses
from PIL import Image
from safetensors.torch import load_file

from gspn_dit import GSPNDiTPipeline
from gspn_dit.commands import EncodeOptions, ExportOptions, SampleOptions
from gspn_dit.config import Config
from gspn_dit.data import LatentStore, how_to_encode
from gspn_dit.data.encode import encode
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.inference.export import main as export
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.inference.sample import main as sample
from gspn_dit.models import create_model
from gspn_dit.training.conditions import open_condition
from gspn_dit.training.diffusion import check_options
from gspn_dit.training.loop import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TOKENS = 20


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A text encoder's folder; its tokenizer lies beside it."""
    return write_text_encoder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("data") / "pictures", CAPTIONS * 2)


def begin(run, source, parts, *changes, frozen=False):
    reader = ("--text.encoder", parts) if frozen else ("--text.tokenizer", parts.parent / "tokenizer")
    overrides = {"width": 32, "depth": 2, "num_groups": 2, "global_layers": 1, "chunk": 2, "text_depth": 1}
    overrides |= {} if frozen else {"text_width": 16}
    own = ("--model.name", "gspn-t2i-ti-1", "--model.overrides", json.dumps(overrides), "--text.max_tokens", TOKENS)
    return config(run, source, *own, *reader, *changes)


def store_of(pictures, parts, out, frozen=False, **more):
    reader = {"text_encoder": str(parts)} if frozen else {"tokenizer": str(parts.parent / "tokenizer")}
    given = {"num_workers": 0, "device": "cpu", "tokens": TOKENS, **reader, **more}
    encode(EncodeOptions(str(pictures), "digits", 32, str(out), **given))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures, parts):
    """Eight steps with a text encoder of its own, and a grid."""
    folder = tmp_path_factory.mktemp("run")
    train(begin(folder, pictures, parts, "--training.sample_every", 8))
    return folder


def test_a_run_continues_as_if_it_had_not_stopped(run, pictures, parts, tmp_path):
    train(begin(tmp_path, pictures, parts, "--training.max_steps", 4))
    train(begin(tmp_path, pictures, parts, "--resume", "auto"))
    assert losses(tmp_path) == losses(run)


def test_its_grids_show_the_first_captions_of_the_data(run):
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["sampling"]["prompts"] == list(CAPTIONS + CAPTIONS[:1]), "four, which is num_images"
    (grid,) = run.glob("samples/*.png")
    with Image.open(grid) as picture:
        assert picture.width > 64


@pytest.mark.parametrize("frozen", [False, True], ids=["own", "frozen"])
def test_stored_captions_train_as_those_that_are_read(pictures, parts, tmp_path, frozen):
    """To the float16 that a store holds."""
    store = store_of(pictures, parts, tmp_path / "store", frozen)
    for name, source in {"read": pictures, "stored": store}.items():
        train(begin(tmp_path / name, source, parts, "--training.max_steps", 4, frozen=frozen))
    first, second = ([float(loss) for _, loss in losses(tmp_path / name)] for name in ("read", "stored"))
    assert first == pytest.approx(second, rel=2e-2)
    assert yaml.safe_load((tmp_path / "stored" / "config.yaml").read_text())["sampling"]["prompts"][:3] == list(
        CAPTIONS
    )


def test_a_store_of_states_is_declared_and_made_by_its_encoder(pictures, parts, tmp_path):
    store = LatentStore(store_of(pictures, parts, tmp_path / "store", frozen=True))
    assert store.condition_names == (
        "class_labels",
        "input_ids",
        "encoder_hidden_states",
        "encoder_attention_mask",
    )
    other = write_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"its captions are of another encoder .*; name that as text\.encoder"):
        train(begin(tmp_path / "run", tmp_path / "store", other, frozen=True))
    with pytest.raises(InputError, match="its captions are of another tokenizer"):
        train(begin(tmp_path / "run", tmp_path / "store", parts, "--text.max_tokens", 21))


def test_captions_that_are_too_long_are_said_before_the_training(pictures, parts, tmp_path):
    with pytest.warns(UserWarning, match="2 of 6 captions looked at are cut to 12 tokens, .* of 15; .*text.max_tokens"):
        train(begin(tmp_path, pictures, parts, "--text.max_tokens", 12, "--training.max_steps", 1))


def test_how_a_store_is_made_again_names_what_read_its_captions(pictures, parts, tmp_path):
    store_of(pictures, parts, tmp_path, frozen=True)
    (tmp_path / "manifest.json").unlink()
    assert f"--text-encoder {parts} --tokens {TOKENS} --out {tmp_path}" in how_to_encode(tmp_path)
    store_of(pictures, parts, tmp_path, frozen=True)
    assert len(LatentStore(tmp_path)) == 6


@pytest.mark.parametrize("name", ["scenes", "emoji"])
def test_the_recipes_are_of_models_that_there_are(name):
    recipe = Config.load(ROOT / "configs" / "t2i" / f"{name}.yaml")
    check_options(recipe)
    with torch.device("meta"):
        model = create_model(recipe.model.name, text_length=recipe.text.max_tokens, **recipe.model.overrides)
    assert model.conditioned_on == "text" and not recipe.data.horizontal_flip


def test_what_draws_classes_takes_no_text_and_the_other_way_round(pictures, parts, tmp_path, store):
    with pytest.raises(InputError, match=r"text\.tokenizer=.*gspn-dit-ti-1 draws classes"):
        train(config(tmp_path, "digits", "--text.tokenizer", parts.parent / "tokenizer"))
    with pytest.raises(InputError, match=r"data\.source='digits': its images have no captions"):
        train(begin(tmp_path, "digits", parts))
    with pytest.raises(InputError, match="it holds no captions; encode with --tokenizer"):
        train(begin(tmp_path, store, parts, "--data.image_size", LatentStore(store).image_size))
    with pytest.raises(InputError, match=r"model\.overrides\.vocab_size: the data sets it"):
        train(begin(tmp_path, pictures, parts, "--model.overrides", "{vocab_size: 3}"))


def test_captions_that_say_left_or_right_are_named_where_images_are_mirrored(pictures, parts, tmp_path):
    """Those of a folder, and of a store of scenes that has mirrored latents, which is refused."""
    mirrored = ("--data.horizontal_flip", "true")
    config = begin(tmp_path / "run", pictures, parts, *mirrored)
    with pytest.warns(UserWarning, match="say left or right, such as 'a green three left of a red seven'"):
        open_condition("text", config, torch.device("cpu"))
    store = store_of(pictures, parts, tmp_path / "store", horizontal_flip=True)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"data": "scenes"}))
    config = begin(tmp_path / "run", store, parts, *mirrored)
    with pytest.raises(InputError, match=r"^data\.horizontal_flip=True: mirrored images of scenes are not"):
        open_condition("text", config, torch.device("cpu"))


def test_prompts_of_a_model_of_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"sampling\.prompts=.*gspn-dit-ti-1 draws classes"):
        train(config(tmp_path, "digits", "--sampling.prompts", "[a red three]"))


def test_a_run_whose_tokenizer_has_changed_draws_nothing(pictures, parts, tmp_path):
    mine = shutil.copytree(parts.parent, tmp_path / "text") / "text_encoder"
    train(begin(tmp_path / "run", pictures, mine, "--training.max_steps", 1))
    load_pipeline(tmp_path / "run")
    vocabulary = mine.parent / "tokenizer" / "vocab.json"
    ids = json.loads(vocabulary.read_text())
    ids["red</w>"], ids["blue</w>"] = ids["blue</w>"], ids["red</w>"]
    vocabulary.write_text(json.dumps(ids))
    with pytest.raises(InputError, match="trained with captions read by tokenizer"):
        load_pipeline(tmp_path / "run")


def test_a_tokenizer_that_fills_up_with_another_token_is_refused(run):
    pipe = load_pipeline(run)
    pipe.tokenizer.pad_token = "red</w>"
    with pytest.raises(InputError, match="made for pad_token"):
        GSPNDiTPipeline(pipe.transformer, pipe.vae, pipe.scheduler, tokenizer=pipe.tokenizer)


def test_another_tokenizer_does_not_resume(run, pictures, parts, tmp_path):
    train(begin(tmp_path, pictures, parts, "--training.max_steps", 4))
    with pytest.raises(InputError, match="reads captions by"):
        train(begin(tmp_path, pictures, parts, "--resume", "auto", "--text.max_tokens", 21))


def test_it_starts_from_anothers_weights(run, pictures, parts, tmp_path):
    train(begin(tmp_path, pictures, parts, "--model.init_from", run, "--training.max_steps", 1))
    ours, theirs = (load_pipeline(each).transformer.state_dict() for each in (tmp_path, run))
    name = "text_encoder.tokens.weight"
    moved, begun = (ours[name] - theirs[name]).abs().max(), theirs[name].abs().max()
    assert moved < 0.01 < begun


def test_its_samples_are_scored_on_captions_of_the_data(pictures, parts, tmp_path):
    pytest.importorskip("torch_fidelity")
    scored = ("--evaluation.every", 2, "--evaluation.num_samples", 6, "--evaluation.reference", "digits:test")
    scored += ("--evaluation.features", "digits", "--training.max_steps", 2)
    train(begin(tmp_path, pictures, parts, *scored))
    header = (tmp_path / "evaluation.csv").read_text().splitlines()[0]
    assert "class_accuracy" not in header


def drawn(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_prompts_are_drawn_the_same_in_any_batch(run, tmp_path):
    for size in (1, 3):
        given = dict(prompts="a red three", num_images=3, batch_size=size, device="cpu", mixed_precision="no")
        sample(SampleOptions(str(run), out=f"{tmp_path / str(size)}/", **given))
    assert drawn(tmp_path / "1") == drawn(tmp_path / "3") and len(drawn(tmp_path / "1")) == 3
    rows = [json.loads(line) for line in (tmp_path / "1" / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": f"00000{i}.png", "text": "a red three"} for i in range(3)]


def test_prompts_come_from_a_file_in_turn_or_from_the_run(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red three\n\na blue seven\n")
    given = dict(num_images=3, device="cpu")
    sample(SampleOptions(str(run), prompts=str(tmp_path / "prompts.txt"), out=f"{tmp_path}/file/", **given))
    sample(SampleOptions(str(run), out=f"{tmp_path}/own/", **given))
    texts = {
        name: [json.loads(line)["text"] for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]
        for name in ("file", "own")
    }
    assert texts == {"file": ["a red three", "a blue seven", "a red three"], "own": list(CAPTIONS)}


def test_an_exported_folder_draws_the_same_without_the_run(run, tmp_path):
    export(ExportOptions(str(run), str(tmp_path / "model")))
    assert {"tokenizer", "transformer", "vae", "scheduler"} <= set(os.listdir(tmp_path / "model"))
    call = dict(prompt=["a red three", "a blue seven"], output_type="pt", return_dict=False)
    images = []
    for pipe in (
        load_pipeline(run),
        GSPNDiTPipeline.from_pretrained(tmp_path / "model"),
        load_pipeline(tmp_path / "model"),
    ):
        pipe.set_progress_bar_config(disable=True)
        images += pipe(generator=[image_generator(0, i) for i in range(2)], **call)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "text-to-image" in card and "prompt=['a red three'" in card


def test_a_frozen_encoder_goes_with_the_export(pictures, parts, tmp_path):
    train(begin(tmp_path / "run", pictures, parts, "--training.max_steps", 4, frozen=True))
    export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "model")))
    pipes = load_pipeline(tmp_path / "run"), GSPNDiTPipeline.from_pretrained(tmp_path / "model")
    images = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        images += pipe(prompt="a red three", generator=image_generator(0, 0), output_type="pt", return_dict=False)
    assert torch.equal(*images)
    assert type(pipes[1].text_encoder).__name__ == "CLIPTextModel"
    saved = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in saved), "as transformers 4 calls them"
    assert (tmp_path / "model" / "tokenizer" / "vocab.json").is_file(), "which transformers 4 reads"


def test_the_other_kind_of_subject_is_refused_in_one_line(run, tmp_path):
    pipe = load_pipeline(run)
    with pytest.raises(InputError, match="class_labels=3: this model draws from text; give prompt"):
        pipe(3)
    with pytest.raises(InputError, match="prompt=None: wanted a text"):
        pipe()
    with pytest.raises(InputError, match="class_labels: this model draws from text"):
        pipe.class_ids([3])
    with pytest.raises(InputError, match="class_labels='3': this model draws from text; give prompts"):
        sample(SampleOptions(str(run), class_labels="3", out=f"{tmp_path}/x/", device="cpu"))
    with pytest.raises(InputError, match="prompts='a three': this model draws classes; give class_labels"):
        sample(SampleOptions("digits", prompts="a three", out=f"{tmp_path}/y/", device="cpu"))
    with pytest.raises(InputError, match="prompt='a three': this model draws classes; give class_labels"):
        load_pipeline("digits")(prompt="a three")
    with pytest.raises(InputError, match=r"prompts='.*none.txt': cannot be read"):
        SampleOptions(str(run), prompts=str(tmp_path / "none.txt"))


def test_too_long_a_prompt_is_cut_with_a_warning(run):
    pipe = load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    call = dict(generator=image_generator(0, 0), output_type="pt", return_dict=False, num_inference_steps=1)
    with pytest.warns(UserWarning, match="cut to 20 tokens"):
        (long,) = pipe(prompt="a red three " + "a " * 30, **call)
    assert long.isfinite().all()
