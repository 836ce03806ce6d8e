"""Training text-to-image models as users start it: real UNets and text encoders, tiny, on made captioned pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from made.captioned_runs import TEXT_ENCODER, config, options
from made.captions import CAPTIONS, write_captioned, write_tokenizer
from made.launched import MANY, train_many
from made.runs import list_checkpoints
from made.training import ROOT, losses
from PIL import Image
from safetensors.torch import load_file

from gspn_dit.commands import run as run_command
from gspn_dit.data import LatentStore
from gspn_dit.errors import InputError
from gspn_dit.inference.stable_diffusion import draw_prompt_grid, load_stable_diffusion
from gspn_dit.storage.run_folder import RunFolder
from gspn_dit.text.tokens import load_tokenizer, tokenize
from gspn_dit.text_to_image_config import TextToImageConfig
from gspn_dit.training.loop import train
from gspn_dit.training.text_to_image import TextToImageTask, scheduler_of, text_options_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokens") / "tokenizer")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, data, tokenizer):
    """A finished run with a grid, and the pipeline that it was exported as."""
    folder = tmp_path_factory.mktemp("exported")
    train(config(folder / "run", data, tokenizer, "--training.sample_every", 6))
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command("export", argv=[str(folder / "run"), str(folder / "pipe")])
    return folder


def weights(run, name="model.safetensors"):
    return load_file(list_checkpoints(run)[-1] / name)


def store_of(data, tokenizer, out, *changes):
    given = ["--data", data, "--vae", "digits", "--image-size", 32, "--out", out, "--num-workers", 0]
    given += ["--tokenizer", tokenizer, "--tokens", 16, *changes]
    run_command("encode", argv=[str(value) for value in given])
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def test_a_run_cut_back_to_a_checkpoint_goes_on_to_the_same_losses_and_weights(tmp_path, data, tokenizer):
    changes = ["--training.max_grad_norm", 1, "--training.weight_decay", 0.01, "--diffusion.caption_dropout", 0.5]
    train(config(tmp_path / "whole", data, tokenizer, *changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(list_checkpoints(tmp_path / "cut")[-1])
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.rand(3)  # whatever else was drawn
    train(config(tmp_path / "cut", data, tokenizer, *changes, "--resume", "auto", "--data.num_workers", 1))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 6
    for name in ("model.safetensors", "ema/diffusion_pytorch_model.safetensors"):
        ours, theirs = weights(tmp_path / "cut", name), weights(tmp_path / "whole", name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path, data, tokenizer):
    train(config(tmp_path / "one", data, tokenizer))
    AcceleratorState._reset_state(reset_partial_state=True)
    split = ["--training.gradient_accumulation_steps", 2]
    train_many(tmp_path, [("TextToImageConfig", options(tmp_path / "two", data, tokenizer, *split))], MANY)
    one, two = (torch.tensor([float(loss) for _, loss in losses(tmp_path / run)]) for run in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)


def test_a_store_holds_the_tokens_of_its_captions_and_trains(tmp_path, data, tokenizer):
    store = store_of(data, tokenizer, tmp_path / "store")
    reader, tokens = LatentStore(store), load_tokenizer(tokenizer, 16)
    for i, caption in enumerate(CAPTIONS):
        assert torch.equal(reader.sample(i)["input_ids"], tokenize(tokens, [caption])[0])
    train(config(tmp_path / "run", store, tokenizer, "--training.sample_every", 6))
    train(config(tmp_path / "images", data, tokenizer))
    found, of_images = (torch.tensor([float(loss) for _, loss in losses(tmp_path / run)]) for run in ("run", "images"))
    torch.testing.assert_close(found, of_images, rtol=1e-2, atol=0)  # float16 in the store
    assert RunFolder(tmp_path / "run").samples(6).is_file()


def opened(*arguments):
    return TextToImageTask.open(config(*arguments), Accelerator())[0]


def test_captions_that_are_cut_or_false_of_mirrored_images_are_named(tmp_path, data, tokenizer):
    mirrored, said = ("--data.horizontal_flip", "true"), "1 of 3 captions looked at say left or right, such as 'a green"
    with pytest.warns(UserWarning, match=said):
        opened(tmp_path, data, tokenizer, *mirrored)
    store = store_of(data, tokenizer, tmp_path / "store", "--horizontal-flip", "true")
    with pytest.warns(UserWarning, match=said):
        opened(tmp_path, store, tokenizer, *mirrored)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"data": "scenes"}))
    with pytest.raises(InputError, match=r"^data\.horizontal_flip=True: mirrored images of scenes are not"):
        opened(tmp_path, store, tokenizer, *mirrored)
    few = TEXT_ENCODER.replace("16}", "8}")
    with pytest.warns(UserWarning, match=r"1 of 3 captions .* cut to 8 tokens, .*model\.text_encoder\.max_position"):
        opened(tmp_path, data, tokenizer, "--model.text_encoder", few)


def test_a_begun_store_says_how_to_finish_it(tmp_path, data, tokenizer):
    store = store_of(data, tokenizer, tmp_path / "store")
    (store / "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"--tokenizer {tokenizer} --tokens 16 --out {store}`"):
        LatentStore(store)
    assert len(LatentStore(store_of(data, tokenizer, store))) == len(CAPTIONS)


def test_an_export_is_a_pipeline_of_diffusers_that_draws_the_runs_grid(tmp_path, exported):
    pipe = StableDiffusionPipeline.from_pretrained(exported / "pipe", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.unet.config.sample_size, pipe.tokenizer.model_max_length, pipe.safety_checker) == (8, 16, None)
    drawn = RunFolder(exported / "run").samples(6)
    draw_prompt_grid(pipe, CAPTIONS, tmp_path / "grid.png", seed=0, num_inference_steps=2, guidance_scale=3)
    ours, theirs = (np.asarray(Image.open(path), dtype=int) for path in (tmp_path / "grid.png", drawn))
    assert ours.shape == theirs.shape and abs(ours - theirs).max() <= 1
    assert (exported / "pipe" / "samples.png").read_bytes() == drawn.read_bytes()
    assert str(exported) not in "".join(path.read_text() for path in (exported / "pipe").rglob("*.json"))
    as_before = load_file(exported / "pipe" / "text_encoder" / "model.safetensors")  # as transformers 4 reads it
    assert all(name.startswith("text_model.") for name in as_before)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (exported / "pipe" / "tokenizer").iterdir()}
    averaged = weights(exported / "run", "ema/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(p, averaged[f"unet.{name}"]) for name, p in pipe.unet.named_parameters())


def test_prompts_of_the_configuration_are_drawn(tmp_path, data, tokenizer):
    changes = ["--training.sample_every", 3, "--training.max_steps", 3, "--sampling.prompts"]
    for name, prompts in (("one", "[a red seven]"), ("four", "[a red seven, a blue three, of left, '']")):
        train(config(tmp_path / name, data, tokenizer, *changes, prompts))
    one, four = (Image.open(RunFolder(tmp_path / name).samples(3)) for name in ("one", "four"))
    assert four.width > one.width and four.height > one.height


def test_fine_tuning_begins_with_the_weights_of_a_saved_pipeline(tmp_path, data, exported):
    given = ["--model.unet", "{}", "--model.text_encoder", "{}", "--model.base", exported / "pipe"]
    given += ["--training.learning_rate", "1e-12", "--training.max_steps", 1, "--training.checkpoint_every", 1]
    train(config(tmp_path / "run", data, exported / "pipe" / "tokenizer", *given))
    theirs = weights(exported / "run", "ema/diffusion_pytorch_model.safetensors")
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-9)


def test_a_text_encoder_of_another_model_may_stay_as_it_is(tmp_path, data, tokenizer, exported):
    given = ["--model.text_encoder", "{}", "--model.text_encoder_from", exported / "pipe" / "text_encoder"]
    train(config(tmp_path / "run", data, tokenizer, *given, "--model.train_text_encoder", "false"))
    before, after = weights(exported / "run", "ema/diffusion_pytorch_model.safetensors"), weights(tmp_path / "run")
    for name, tensor in after.items():
        if name.startswith("text_encoder."):
            assert torch.equal(tensor, before[name])
    assert losses(tmp_path / "run") != losses(exported / "run")


def test_dropped_captions_are_all_the_empty_one(tmp_path, data, tokenizer):
    others = shutil.copytree(data, tmp_path / "others")
    for path in others.glob("*.txt"):
        path.write_text("left of green")
    for share, same in ((1, True), (0, False)):
        of = [tmp_path / f"{share}-{name}" for name in ("data", "others")]
        for run, source in zip(of, (data, others), strict=True):
            train(config(run, source, tokenizer, "--diffusion.caption_dropout", share, "--training.max_steps", 2))
        assert (losses(of[0]) == losses(of[1])) is same


@pytest.mark.parametrize(
    "change",
    [
        "--diffusion.prediction_type v_prediction",
        "--diffusion.min_snr_gamma 5",
        "--data.sample_posterior false",
        "--data.horizontal_flip true",
    ],
)
def test_an_option_is_heeded(tmp_path, data, tokenizer, exported, change):
    train(config(tmp_path / "run", data, tokenizer, *change.split()))
    assert losses(tmp_path / "run") != losses(exported / "run")
    index = list_checkpoints(tmp_path / "run")[-1] / "metadata.json"
    expected = "v_prediction" if "v_prediction" in change else "epsilon"
    assert json.loads(index.read_text())["chain"]["prediction_type"] == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--model.unet.sample_size", "4"], "model.unet.sample_size: the data set it"),
        (["--model.unet.blocks", "4"], "model.unet: no UNet2DConditionModel is made of these"),
        (["--model.text_encoder.depth", "4"], "model.text_encoder: CLIPTextConfig has no option 'depth'"),
        (["--model.text_encoder.vocab_size", "10"], "model.text_encoder.vocab_size=10: the tokenizer has"),
        (["--model.tokenizer", "no/such/folder"], "model.tokenizer='no/such/folder': no such folder"),
        (["--model.base", "no/such"], "model.unet="),
        (["--model.text_encoder_from", "x"], "model.text-encoder="),
        (["--data.source", "digits"], "data.source='digits': its images have no captions"),
        (["--data.source", "no/such/folder"], "data.source='no/such/folder': no such folder"),
        (["--data.image_size", "30"], "data.image_size=30"),
        (["--diffusion.caption_dropout", "2"], "--diffusion.caption-dropout=2.0"),
        (["--diffusion.min_snr_gamma", "0"], "--diffusion.min-snr-gamma=0.0"),
        (["--sampling.num_inference_steps", "300"], "sampling.num_inference_steps=300"),
        (["--training.gradient_accumulation_steps", "3"], "training.batch_size=4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configuration_stops_at_start_with_its_name(tmp_path, data, tokenizer, changes, named):
    with pytest.raises(InputError) as error:
        train(config(tmp_path / "run", data, tokenizer, *changes))
    assert named in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path, data, tokenizer):
    given = ["--model.unet", "{}", "--model.text_encoder", "{}", "--model.base", tmp_path]
    with pytest.raises(InputError, match=r"^model\.base: what is in .*text_encoder cannot be read"):
        train(config(tmp_path / "run", data, tokenizer, *given))


def test_a_store_of_other_tokens_is_refused(tmp_path, data, tokenizer):
    few = write_tokenizer(tmp_path / "few", ("a", "red"))
    plain = ["--data", "digits", "--split", "test", "--vae", "digits", "--image-size", "32"]
    run_command("encode", argv=[*plain, "--out", str(tmp_path / "plain")])
    AcceleratorState._reset_state(reset_partial_state=True)
    for store, said in (
        (tmp_path / "plain", "holds no tokens of captions; encode anew with --tokenizer"),
        (store_of(data, tokenizer, tmp_path / "long", "--tokens", 9), "9 tokens, and the text encoder takes 16"),
        (store_of(data, few, tmp_path / "other"), "tokens are of another tokenizer"),
    ):
        with pytest.raises(InputError, match=rf"^data\.source=.*{said}"):
            train(config(tmp_path / "run", store, tokenizer))


def test_a_run_is_not_continued_as_another(tmp_path, data, tokenizer):
    train(config(tmp_path / "run", data, tokenizer, "--training.max_steps", 3))
    few = write_tokenizer(tmp_path / "few", ("a", "red"))
    for change, named in (
        (["--model.unet.layers_per_block", 2], r"model\.unet=.*the run in .* has"),
        (["--diffusion.prediction_type", "v_prediction"], r"diffusion\.prediction_type='v_prediction': the run in"),
        (["--model.tokenizer", few], r"model\.tokenizer=.*began with tokenizer"),
    ):
        with pytest.raises(InputError, match=rf"^{named}"):
            train(config(tmp_path / "run", data, tokenizer, "--resume", "auto", *change))


def test_the_recipe_runs_on_made_pictures(tmp_path, data, tokenizer):
    changes = ["--output_dir", tmp_path / "run", "--data.source", data, "--data.vae", "digits"]
    changes += ["--model.tokenizer", tokenizer, "--training.max_steps", 1, "--training.batch_size", 2]
    changes += ["--training.trackers", "[]", "--sampling.num_inference_steps", 2, "--sampling.num_images", 2]
    train(TextToImageConfig.load(ROOT / "configs" / "t2i" / "scenes-teacher.yaml", [str(value) for value in changes]))
    assert len(losses(tmp_path / "run")) == 1 and RunFolder(tmp_path / "run").samples(1).is_file()


def test_a_saved_text_encoder_has_transformers_defaults_where_its_config_says_nothing(tmp_path, monkeypatch):
    """transformers 4 leaves defaults out of what `to_diff_dict` gives, and CLIP ViT-B/32's are those."""
    from transformers import CLIPTextConfig

    default = CLIPTextConfig().to_dict()

    def shorter(self):
        return {key: value for key, value in self.to_dict().items() if key not in default or value != default[key]}

    CLIPTextConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    monkeypatch.setattr(CLIPTextConfig, "to_diff_dict", shorter)
    given = ["--model.text_encoder", "{}", "--model.text_encoder_from", tmp_path]
    found = text_options_of(config(tmp_path / "run", "scenes", "scenes", *given))
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    assert {name: found[name] for name in names} == {name: default[name] for name in names} | {"num_hidden_layers": 1}


def test_a_base_with_another_kind_of_chain_is_refused(tmp_path):
    DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(InputError, match=r"model\.base=.*rescale_betas_zero_snr=True"):
        scheduler_of(
            config(
                tmp_path / "run",
                "scenes",
                "scenes",
                "--model.unet",
                "{}",
                "--model.text_encoder",
                "{}",
                "--model.base",
                tmp_path,
            )
        )


def test_a_run_whose_tokenizer_has_changed_is_not_exported(tmp_path, data, tokenizer):
    mine = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    train(config(tmp_path / "run", data, mine, "--training.max_steps", 1))
    ids = json.loads((mine / "vocab.json").read_text())
    ids["red</w>"], ids["blue</w>"] = ids["blue</w>"], ids["red</w>"]
    (mine / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(InputError, match=r"model\.tokenizer=.*trained with captions read by tokenizer"):
        load_stable_diffusion(RunFolder(tmp_path / "run").newest_checkpoint())
