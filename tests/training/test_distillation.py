"""Distillation of replaced self-attention: its loss by hand, what changes and what does not, and its harness."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler, StableDiffusionPipeline
from made.captions import write_captioned
from made.classifying import write_idx_folder
from made.distilling import CAPTIONS, SIZE, TEACHERS, config, options, parts, write_teacher
from made.launched import MANY, train_many
from made.runs import list_checkpoints
from made.training import losses
from safetensors.torch import load_file
from torch.utils.data import default_collate

from gspn_dit.autoencoder.vae import sample_posterior, weights_sha256
from gspn_dit.commands import EncodeTextToImageOptions, ExportOptions
from gspn_dit.data import LatentStore
from gspn_dit.data.encode_t2i import main as encode
from gspn_dit.distillation_config import DistillationConfig
from gspn_dit.errors import InputError
from gspn_dit.inference.export import main as export
from gspn_dit.models.attention_replacement import AttentionReplacement
from gspn_dit.text.teacher import embed, embed_nothing, load_teacher
from gspn_dit.training.distillation import DistillationTask, check_not_sharded, open_data, teacher_of
from gspn_dit.training.loop import take_steps, train
from gspn_dit.training.stop_request import StopRequest

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ROOT = Path(__file__).parents[2]
STAGES = ("layerwise", "end-to-end")
WEIGHTS = ["--distillation.noise_weight", 0.7, "--distillation.teacher_weight", 1.3, "--distillation.feature_weight", 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of the teachers, captioned pictures, and a store of them by each teacher."""
    folder = tmp_path_factory.mktemp("made")
    for kind in TEACHERS:
        write_teacher(folder, kind)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def opened(made, run, kind="sd", *changes):
    """A task as the loop opens it, and its first batch."""
    task, model = DistillationTask.open(config(run, made / kind, made / f"{kind}-store", *changes), Accelerator())
    return task, model, task.batch(default_collate([task.samples[n] for n in range(3)]), step=1)


def by_hand(made, kind, task, batch):
    """A teacher that knows nothing of this package; noisy latents, times and target by diffusers; and the arguments."""
    pipe = load_teacher(made / kind)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    times = (batch["u"] * 1000).long()
    noisy = schedule.add_noise(batch["latents"], batch["noise"], times)
    v = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(batch["latents"], batch["noise"], times) if v else batch["noise"]
    told = batch["condition"]
    given = {"encoder_hidden_states": told["encoder_hidden_states"]}
    if kind == "sdxl":
        given["added_cond_kwargs"] = {name: told[name] for name in ("text_embeds", "time_ids")}
    return pipe.unet, noisy, times, target, given


def note_calls(unet, names):
    """Inputs and outputs of modules of a UNet, by name, from now on."""
    heard = {}
    for name in names:
        unet.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: heard.__setitem__(name, (inputs[0], output))
        )
    return heard


def copied(model):
    """Layers of the same weights, not mounted."""
    other = AttentionReplacement(model.config.layers)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_loss_is_the_weighted_sum_of_three_errors(made, tmp_path, kind):
    task, model, batch = opened(made, tmp_path / "run", kind, *WEIGHTS)
    unet, noisy, times, target, given = by_hand(made, kind, task, batch)
    with torch.no_grad():
        found = task.loss(model, batch)
        by_teacher = note_calls(unet, model.layer_names)
        taught = unet(noisy, times, **given).sample
        copied(model).mount(unet)
        by_student = note_calls(unet, model.layer_names)
        predicted = unet(noisy, times, **given).sample
    for i in range(3):
        features = [((by_teacher[n][1][i] - by_student[n][1][i]) ** 2).mean() for n in model.layer_names]
        wanted = 0.7 * ((predicted[i] - target[i]) ** 2).mean() + 1.3 * ((predicted[i] - taught[i]) ** 2).mean()
        torch.testing.assert_close(found[i], wanted + 2 * torch.stack(features).mean(), rtol=1e-4, atol=1e-6)
    assert len(model.layer_names) == (11 if kind == "sdxl" else 7)


@pytest.mark.parametrize("kind", TEACHERS)
def test_layers_learn_alone_on_the_teachers_inputs(made, tmp_path, kind):
    task, model, batch = opened(made, tmp_path / "run", kind, "--distillation.stage", "layerwise")
    unet, noisy, times, _, given = by_hand(made, kind, task, batch)
    heard = note_calls(unet, model.layer_names)
    with torch.no_grad():
        unet(noisy, times, **given)
    loss = task.loss(model, batch)
    layers = copied(model)
    errors = []
    for name in model.layer_names:
        inputs, output = heard[name]
        layers.layer(name).size = model.sizes[name]
        answer = layers.layer(name)(inputs)
        errors.append([((answer[i] - output[i]) ** 2).mean() / output[i].var(correction=0) for i in range(3)])
    wanted = torch.tensor(errors).mean(0)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    loss.mean().backward()  # each by its own error alone
    torch.stack([error for each in errors for error in each]).mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_it_learns(made, tmp_path, kind, stage):
    """A teacher of random weights has no picture in mind: against its own answers."""
    changes = ["--training.max_steps", 12, "--training.learning_rate", 2e-3, "--distillation.noise_weight", 0]
    train(config(tmp_path / "run", made / kind, made / f"{kind}-store", "--distillation.stage", stage, *changes))
    found = parts(tmp_path / "run")
    assert found.pop("step") == list(range(1, 13))
    if stage == "end-to-end":
        assert found.pop("noise")[0] > 0.5
        assert sum(found["features"][-3:]) < 0.8 * sum(found["features"][:3])
    else:
        assert all(sum(errors[-3:]) < 0.8 * sum(errors[:3]) for errors in found.values())
    first, *_, last = [float(loss) for _, loss in losses(tmp_path / "run")]
    assert last < 0.8 * first


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_but_the_layers_changes(made, tmp_path, stage):
    task, model, _ = opened(made, tmp_path / "run", "sd", "--distillation.stage", stage)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (tmp_path / "run").mkdir()
    with StopRequest() as stop:
        take_steps(task, model, None, stop)
    model.unmount()
    assert weights_sha256(task.teacher.unet) == weights_sha256(load_teacher(made / "sd").unet)
    assert all(p.grad is None for p in task.teacher.unet.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    weights = load_file(list_checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert weights.keys() == before.keys()


def test_pictures_are_encoded_as_they_come_or_before(made, tmp_path):
    for source in ("sdxl-store", "pictures"):
        train(config(tmp_path / source, made / "sdxl", made / source, "--data.num_workers", 1))
        AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(values(tmp_path / "pictures"), values(tmp_path / "sdxl-store"), rtol=1e-3, atol=0)


def test_latents_that_the_teacher_drew_are_learned_from(made, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    given = {"num_inference_steps": 2, "image_size": SIZE, "device": "cpu"}
    base, out = str(made / "sd2"), str(tmp_path / "store")
    encode(EncodeTextToImageOptions(base=base, prompts=str(tmp_path / "prompts.txt"), out=out, **given))
    train(config(tmp_path / "run", base, out))
    assert len(losses(tmp_path / "run")) == 6


def values(run):
    return torch.tensor([float(loss) for _, loss in losses(run)])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_cut_back_to_a_checkpoint_goes_on_to_the_same_losses(made, tmp_path, stage):
    source = [made / "sdxl", made / "sdxl-store", "--distillation.stage", stage]
    train(config(tmp_path / "whole", *source))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(list_checkpoints(tmp_path / "cut")[-1])
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.rand(3)  # whatever else was drawn
    train(config(tmp_path / "cut", *source, "--resume", "auto", "--data.num_workers", 1))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert parts(tmp_path / "cut") == parts(tmp_path / "whole")
    ours, theirs = (load_file(list_checkpoints(tmp_path / run)[-1] / "model.safetensors") for run in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_learn_as_one(made, tmp_path):
    runs = []
    for stage in STAGES:
        given = [made / "sd", made / "sd-store", "--distillation.stage", stage]
        train(config(tmp_path / f"{stage}-one", *given))
        AcceleratorState._reset_state(reset_partial_state=True)
        split = ["--training.gradient_accumulation_steps", 2]
        runs.append(("DistillationConfig", options(tmp_path / f"{stage}-two", *given, *split)))
    train_many(tmp_path, runs, MANY)
    for stage in STAGES:
        one, two = tmp_path / f"{stage}-one", tmp_path / f"{stage}-two"
        torch.testing.assert_close(values(two), values(one), rtol=1e-4, atol=0)
        for name, numbers in parts(one).items():
            assert parts(two)[name] == pytest.approx(numbers, rel=1e-3)


def test_weights_in_shards_are_refused():
    with pytest.raises(InputError, match=r"distributed_type.*FSDP.*--multi_gpu"):
        check_not_sharded(SimpleNamespace(distributed_type=DistributedType.FSDP))


@pytest.mark.parametrize(
    "change",
    [["--training.gradient_checkpointing", "true"], ["--training.gradient_accumulation_steps", 2]],
    ids=["recomputed", "accumulated"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_neither_recomputing_nor_accumulating_changes_the_losses(made, tmp_path, stage, change):
    given = [made / "sd", made / "sd-store", "--distillation.stage", stage, "--training.max_steps", 4]
    train(config(tmp_path / "plain", *given))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(tmp_path / "changed", *given, *change))
    torch.testing.assert_close(values(tmp_path / "changed"), values(tmp_path / "plain"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_frozen_part_is_kept_in_the_runs_precision(made, tmp_path, kind):
    source = [made / kind, made / f"{kind}-store"]
    train(config(tmp_path / "exact", *source, "--training.max_steps", 3))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(tmp_path / "half", *source, "--training.max_steps", 3, "--training.mixed_precision", "bf16"))
    torch.testing.assert_close(values(tmp_path / "half"), values(tmp_path / "exact"), rtol=0.05, atol=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    task, model = DistillationTask.open(config(tmp_path / "x", *source), Accelerator(mixed_precision="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with task.replacement.unmounted():
        assert {p.dtype for p in task.teacher.unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("mixer", ["gspn", "fresh", "linear", "window"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_mixer_is_taught(made, tmp_path, mixer, stage):
    """On one batch; a linear attention begins all but where a softmax of random weights is."""
    changes = ["--replacement.mixer", mixer, "--distillation.stage", stage, "--distillation.noise_weight", 0]
    task, model, batch = opened(made, tmp_path / "run", "sd", *changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if mixer == "linear" else 1e-3)
    found = []
    for _ in range(6):
        loss = task.loss(model, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    assert found[-1] < 0.95 * found[0]


def test_captions_are_dropped_for_what_the_pipeline_has_for_none(made, tmp_path):
    store = LatentStore(made / "sdxl-store")
    for share in (0, 1):
        task, _, batch = opened(made, tmp_path / "run", "sdxl", "--distillation.caption_dropout", share)
        nothing = embed_nothing(load_teacher(made / "sdxl"))
        for i in range(3):
            kept = store.sample(task.stream.order(i))
            for name, none in nothing.items():
                torch.testing.assert_close(
                    batch["condition"][name][i], none.half().float() if share else kept[name].float()
                )
            assert torch.equal(batch["condition"]["time_ids"][i], kept["time_ids"])
        AcceleratorState._reset_state(reset_partial_state=True)


def test_no_caption_is_rounded_as_the_captions_are(made):
    """To float16 where these come from a store; not at all where they are embedded as they come."""
    pipe = load_teacher(made / "sd")
    stored, as_they_come = (
        teacher_of(pipe, encoded, torch.device("cpu")).nothing["encoder_hidden_states"] for encoded in (True, False)
    )
    exact = embed_nothing(pipe)["encoder_hidden_states"]
    assert exact.dtype == stored.dtype == as_they_come.dtype == torch.float32
    assert torch.equal(as_they_come, exact)
    assert torch.equal(stored, exact.half().float()) and not torch.equal(stored, exact)


def test_captions_that_are_cut_are_said(made, tmp_path):
    source = write_captioned(tmp_path / "pictures", ["a red 3", "a blue 7 " * 14])
    with pytest.warns(UserWarning, match="^1 of 2 captions looked at are cut to 77 tokens, .*; shorten them"):
        open_data(config(tmp_path, made / "sd", source), load_teacher(made / "sd"), torch.device("cpu"))


def test_captions_are_embedded_with_the_picture_they_are_of(made, tmp_path):
    changes = ["--data.source", made / "pictures", "--distillation.caption_dropout", 0]
    task, _, batch = opened(made, tmp_path / "run", "sd", *changes)
    teacher, files = load_teacher(made / "sd"), sorted(map(str, range(len(CAPTIONS))))
    for i in range(3):
        caption = CAPTIONS[int(files[task.stream.order(i)])]  # picture 10 comes before picture 2
        wanted = embed(teacher, [caption])["encoder_hidden_states"][0]
        torch.testing.assert_close(batch["condition"]["encoder_hidden_states"][i], wanted, rtol=1e-4, atol=1e-5)
    store = LatentStore(made / "sd-store")
    noise = torch.stack([task.samples[i]["posterior_noise"] for i in range(3)])
    moments = torch.stack([store.moments(task.stream.order(i)) for i in range(3)])
    torch.testing.assert_close(batch["latents"], sample_posterior(store, moments, noise), rtol=1e-2, atol=1e-3)


def test_the_second_stage_begins_with_what_the_first_has_averaged(made, tmp_path):
    given = [made / "sd", made / "sd-store"]
    train(config(tmp_path / "first", *given, "--distillation.stage", "layerwise"))
    averaged = AttentionReplacement.from_pretrained(list_checkpoints(tmp_path / "first")[-1] / "ema")
    AcceleratorState._reset_state(reset_partial_state=True)
    task, model, _ = opened(made, tmp_path / "second", "sd", "--replacement.init_from", tmp_path / "first")
    assert "first" in task.start(model)
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    AcceleratorState._reset_state(reset_partial_state=True)
    other = ["--replacement.init_from", tmp_path / "first", "--replacement.layers", "mid_block"]
    with pytest.raises(InputError, match=r"replacement.init_from=.*this replacement's not there"):
        train(config(tmp_path / "third", *given, *other))
    with pytest.raises(InputError, match=r"replacement.init_from='nowhere': no such folder"):
        train(config(tmp_path / "third", *given, "--replacement.init_from", "nowhere"))


def test_a_run_is_exported_and_mounted_on_its_base(made, tmp_path):
    train(config(tmp_path / "run", made / "sd", made / "sd-store", "--replacement.keep_attention", "mid_block"))
    export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 layers" in card and "for 6 steps of 4 pictures" in card
    assert not any(str(made) in path.read_text() for path in tmp_path.glob("out/*.[jm][sd]*"))
    pictures = []
    for folder in (tmp_path / "out", list_checkpoints(tmp_path / "run")[-1] / "ema", None):
        pipe = StableDiffusionPipeline.from_pretrained(made / "sd", safety_checker=None)
        if folder is not None:
            AttentionReplacement.from_pretrained(folder).mount(pipe)
        drawn = pipe("a red 3", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
        pictures.append(torch.tensor(drawn.images))
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    with pytest.raises(InputError, match="replaced layers have no VAE"):
        export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "other"), vae="digits"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--base", "nowhere"], "base='nowhere': no such folder, and no hub name"),
        (["--data.source", "nowhere"], "data.source='nowhere': no such folder; .*encode-t2i --base"),
        (["--data.image_size", 32], "data.image_size=32: it holds 16-pixel pictures"),
        (["--replacement.layers", "levels=7"], "replacement.layers=.*levels=7.*: no self-attention at level 7"),
        (["--replacement.keep_attention", "all"], "replacement.keep_attention=.*all.*: no layer is left"),
        (["--training.compile", "auto"], "training.compile='auto'.*false"),
        (["--distillation.caption_dropout", 2], "distillation.caption-dropout=2.0: wanted a share"),
        (["--distillation.stage", "both"], "distillation.stage"),
        (["--training.gradient_accumulation_steps", 3], "training.batch_size"),
    ],
)
def test_bad_input_is_answered_in_a_line_before_any_work(made, tmp_path, changes, said):
    with pytest.raises(InputError, match=said) as error:
        train(config(tmp_path / "run", made / "sd", made / "sd-store", *changes))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_store_that_is_not_finished_is_refused(made, tmp_path):
    shutil.copytree(made / "sd-store", tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"unfinished latent store; to finish .*gspn-dit encode-t2i"):
        train(config(tmp_path / "run", made / "sd", tmp_path / "store"))


def test_data_of_another_teacher_are_refused(made, tmp_path):
    with pytest.raises(InputError, match=r"data.source=.*it holds no text_embeds"):
        train(config(tmp_path / "run", made / "sdxl", made / "sd-store"))
    pipe = load_teacher(made / "sd")
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.01)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"data.source=.*it was made by another text encoder than that of .*other"):
        train(config(tmp_path / "run", tmp_path / "other", made / "sd-store"))
    with pytest.raises(InputError, match=r"data.source"):
        train(config(tmp_path / "run", made / "sd", write_idx_folder(tmp_path / "idx")))


def test_a_run_is_not_continued_with_another_teacher_or_other_layers(made, tmp_path):
    train(config(tmp_path / "run", made / "sd", made / "sd-store", "--training.max_steps", 3))
    pipe = load_teacher(made / "sd")
    shutil.copytree(made / "sd", tmp_path / "moved")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(tmp_path / "run", tmp_path / "moved", made / "sd-store", "--resume", "auto"))
    assert len(losses(tmp_path / "run")) == 6
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.01)
    pipe.save_pretrained(tmp_path / "other")
    again = ["--resume", "auto", "--training.max_steps", 9]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match=r"base=.*other': its UNet is not that of .*moved"):
        train(config(tmp_path / "run", tmp_path / "other", made / "sd-store", *again))
    with pytest.raises(InputError, match=r"replacement.chunk=8: the run in .* has 4"):
        train(config(tmp_path / "run", made / "sd", made / "sd-store", *again, "--replacement.chunk", 8))


@pytest.mark.parametrize("name", ["scenes-distil", "sd15", "sdxl"])
def test_a_recipe_is_one(name):
    recipe = DistillationConfig.load(ROOT / "configs" / "t2i" / f"{name}.yaml")
    loss = recipe.distillation
    assert (loss.noise_weight, loss.teacher_weight, loss.feature_weight) == (1, 0.5, 0.5)
    assert loss.caption_dropout == 0.1
