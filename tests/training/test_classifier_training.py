"""Training classifiers as users start it: the same harness as diffusion's, real components, tiny networks."""

import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from made.classifying import (
    CLASSES,
    EVERYTHING,
    ROOT,
    SIZE,
    accuracies,
    config,
    options,
    write_idx_folder,
)
from made.faults import finished, start, text
from made.images import write_images
from made.runs import list_checkpoints
from made.training import config as diffusion_config
from made.training import losses, rows, wait_for
from safetensors.torch import load_file

from gspn_dit.classifier_config import ClassifierConfig, ClassifierTrainingConfig
from gspn_dit.commands import run as run_command
from gspn_dit.errors import InputError
from gspn_dit.inference.image_classifier import load_classifier
from gspn_dit.models import create_classifier
from gspn_dit.training.classification import parameter_groups, with_steps
from gspn_dit.training.loop import learning_rate_at, train
from gspn_dit.training.step import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RECIPES = sorted((ROOT / "configs" / "classify").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("idx") / "data")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses_scores_and_weights(tmp_path, data):
    changes = [
        *EVERYTHING,
        *("--training.max_steps", 40, "--training.checkpoint_every", 7, "--training.warmup_steps", 5),
        *("--training.lr_schedule", "cosine", "--training.layer_decay", 0.8, "--training.max_grad_norm", 5),
        *("--model.overrides", "{widths: [16, 32], depths: [1, 2], group_width: 8, drop_path_rate: 0.5}"),
        *("--evaluation.every", 10, "--resume", "auto"),
    ]
    train(config(tmp_path / "whole", data, *changes))
    killed, log = tmp_path / "killed", tmp_path / "log"
    for kill_after in (9, 20):
        process = start(options(killed, data, *changes), log, kind=ClassifierConfig)
        wait_for(killed, kill_after)
        process.kill()
        assert finished(process) == -signal.SIGKILL and len(rows(killed)) < 40
    assert finished(start(options(killed, data, *changes), log, kind=ClassifierConfig)) == 0, text(log)
    assert losses(killed) == losses(tmp_path / "whole") and len(losses(killed)) == 40
    assert accuracies(killed) == accuracies(tmp_path / "whole")
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (killed, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("changes", [[], EVERYTHING], ids=["shifted", "everything"])
def test_a_run_cut_back_to_a_checkpoint_goes_on_to_the_same_losses(tmp_path, data, changes):
    train(config(tmp_path / "whole", data, *changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(list_checkpoints(tmp_path / "cut")[-1])
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.rand(3)  # whatever else was drawn
    train(config(tmp_path / "cut", data, *changes, "--resume", "auto", "--data.num_workers", 1))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert accuracies(tmp_path / "cut") == accuracies(tmp_path / "whole")


def values(run):
    return torch.tensor([float(loss) for _, loss in losses(run)])


def test_accumulation_does_not_change_the_losses(tmp_path, data):
    for n in (1, 4):
        train(config(tmp_path / str(n), data, *EVERYTHING, "--training.gradient_accumulation_steps", n))
    torch.testing.assert_close(values(tmp_path / "4"), values(tmp_path / "1"), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_the_pictures_are_learned(tmp_path, data):
    steps = ["--training.max_steps", 80, "--training.ema_decay", 0.9, "--evaluation.every", 80]
    train(config(tmp_path / "run", data, *steps, "--training.learning_rate", 3e-3))
    (row,) = accuracies(tmp_path / "run")
    assert float(row["top1"]) >= 90 and float(row["top5"]) == 100


def test_epochs_are_steps_and_accuracy_is_noted_after_each(tmp_path, data):
    changes = ["--training.max_steps", 0, "--training.epochs", 2, "--evaluation.every", 0]
    train(config(tmp_path / "run", data, *changes))
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 7))  # 24 pictures, 8 a step
    assert [row["step"] for row in accuracies(tmp_path / "run")] == ["3", "6"]
    train(config(tmp_path / "none", data, *changes, "--evaluation.every_epochs", 0))
    assert not (tmp_path / "none" / "evaluation.csv").exists()


def test_steps_and_warm_up_of_epochs():
    resolved = with_steps(ClassifierTrainingConfig(batch_size=2048, epochs=300, warmup_epochs=20), 1_281_167)
    assert (resolved.max_steps, resolved.warmup_steps) == (187_671, 12_512)
    given = with_steps(ClassifierTrainingConfig(batch_size=8, max_steps=5, epochs=300, warmup_steps=2), 24)
    assert (given.max_steps, given.warmup_steps) == (5, 2)


def test_the_learning_rate_rises_from_one_number_and_falls_to_another():
    schedule = ClassifierTrainingConfig(
        max_steps=110, learning_rate=1.0, warmup_steps=10, warmup_learning_rate=0.5, min_learning_rate=0.2,
        lr_schedule="cosine",
    )  # fmt: skip
    assert [learning_rate_at(step, schedule) for step in (2, 10)] == pytest.approx([0.6, 1.0])
    assert [learning_rate_at(step, schedule) for step in (60, 110)] == pytest.approx([0.6, 0.2])


@pytest.mark.parametrize(
    "change",
    [
        "--augmentation.max_shift 0",
        "--augmentation.horizontal_flip 0",
        "--augmentation.erasing 1",
        "--augmentation.mixup 1",
        "--augmentation.cutmix 1",
        "--augmentation.label_smoothing 0.1",
        "--augmentation.sizes [8,16]",
        "--training.layer_decay 0.5",
        "--training.warmup_learning_rate 1e-4 --training.warmup_steps 4",
        "--training.min_learning_rate 5e-4 --training.lr_schedule cosine",
        "--data.mean 0.1",
        "--data.std 0.9",
        "--model.overrides.drop_path_rate 0.5",
        "--model.overrides.mixer attention",
    ],
)
def test_an_option_is_heeded(tmp_path, data, plain, change):
    train(config(tmp_path / "run", data, "--training.max_steps", 4, "--evaluation.every_epochs", 0, *change.split()))
    assert losses(tmp_path / "run") != plain


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    """The losses of four steps that no option changed."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(config(run, data, "--training.max_steps", 4))
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses(run)


def test_biases_norms_and_what_the_model_names_do_not_decay():
    model = create_classifier("gspn-grouped-pico")
    decayed, spared = parameter_groups(model, 0.05, 1.0)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} >= model.no_weight_decay()
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_layers_learn_the_more_slowly_the_earlier_they_are():
    model = create_classifier("gspn-grouped-pico")
    names = {id(p): name for name, p in model.named_parameters()}
    scale, decay = {}, {}
    for group in parameter_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            scale[names[id(parameter)]] = group["lr_scale"]
            decay[names[id(parameter)]] = group["weight_decay"]
    assert scale.keys() == set(names.values())
    first, last = "stages.0.blocks.0.mlp", "stages.1.blocks.3.mlp"
    assert scale["stem.conv1.weight"] < min(v for k, v in scale.items() if k.startswith(first))
    assert max(v for k, v in scale.items() if k.startswith(first)) < min(
        v for k, v in scale.items() if k.startswith(last)
    )
    assert scale["head.weight"] == 1 and decay["head.weight"] == 0.05
    assert all(decay[name] == 0 for name in model.no_weight_decay() | {"head.bias", "norm.weight"} & decay.keys())


def test_a_checkpoint_is_a_model_that_knows_its_pictures(tmp_path, data):
    train(config(tmp_path / "run", data, "--data.class_names", "[low, middle, high]", "--evaluation.crop_pct", 0.9))
    model = load_classifier(tmp_path / "run")
    assert model.pretrained_cfg["label_names"] == ["low", "middle", "high"]
    assert model.pretrained_cfg["input_size"] == (1, SIZE, SIZE) and model.pretrained_cfg["crop_pct"] == 0.9
    assert not model.training and model(torch.zeros(2, 1, 20, 28)).shape == (2, CLASSES)
    averaged = load_file(list_checkpoints(tmp_path / "run")[-1] / "ema" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(parameter, averaged[name]) for name, parameter in model.named_parameters())


def test_a_new_run_begins_with_the_averaged_weights_of_another(tmp_path, data):
    train(config(tmp_path / "first", data))
    begin = ["--model.init_from", tmp_path / "first", "--training.max_steps", 1, "--training.learning_rate", 1e-12]
    train(config(tmp_path / "same", data, *begin))
    other = write_idx_folder(tmp_path / "other", classes=4)
    train(config(tmp_path / "more", other, *begin))
    theirs = dict(load_classifier(tmp_path / "first").named_parameters())
    for run, fresh in (("same", set()), ("more", {"head.weight", "head.bias"})):
        ours = load_file(list_checkpoints(tmp_path / run)[-1] / "model.safetensors")
        for name in ours.keys() - fresh:
            torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=0, atol=1e-9)
    with pytest.raises(InputError, match=r"^model\.init_from=.*this model's not there"):
        train(config(tmp_path / "third", data, *begin, "--model.overrides.depths", "[1, 1]"))
    assert not (tmp_path / "third").exists()


def test_an_average_of_another_width_is_a_classifier_too(tmp_path, data):
    run, out = tmp_path / "run", tmp_path / "average"
    train(config(run, data, "--training.posthoc_ema_every", 2))
    run_command("posthoc-ema", argv=["--run", str(run), "--sigma-rel", "0.07", "--out", str(out)])
    averaged, weights = load_classifier(out), dict(load_classifier(run).named_parameters())
    assert averaged.pretrained_cfg["label_names"] == ["0", "1", "2"]
    assert any(not torch.equal(parameter, weights[name]) for name, parameter in averaged.named_parameters())


def test_pictures_of_a_folder_train_with_a_published_model(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / "data" / split / name, count=count)
    small = "{widths: [12, 24], depths: [1, 1], chunks: [2, null], rank: 2}"
    changes = ["--model.name", "gspn-t", "--model.overrides", small, *EVERYTHING, "--training.max_steps", 2]
    train(config(tmp_path / "run", tmp_path / "data", *changes, "--training.batch_size", 4, "--data.image_size", 16))
    (row,) = accuracies(tmp_path / "run")
    assert row["num_images"] == "4.0" and len(losses(tmp_path / "run")) == 2
    assert load_classifier(tmp_path / "run").pretrained_cfg["label_names"] == ["cat", "dog"]


def test_digits_are_classified_too(tmp_path):
    changes = ["--data.image_size", 32, "--training.max_steps", 1, "--evaluation.batch_size", 100]
    train(config(tmp_path / "run", "digits", *changes))
    assert accuracies(tmp_path / "run")[0]["num_images"] == "500.0"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--model.name", "gspn-xxl"], "model.name='gspn-xxl'"),
        (["--model.name", "gspn-dit-xl-2"], "model.name='gspn-dit-xl-2'"),
        (["--model.overrides.mixxer", "gspn"], "model.overrides.mixxer"),
        (["--model.overrides.num_classes", "5"], "model.overrides.num_classes: the data set it"),
        (["--data.source", "no/such/folder"], "data.source='no/such/folder': no such folder"),
        (["--data.class_names", "[one, two]"], "data.class_names=['one', 'two']"),
        (["--data.mean", "[0.1, 0.2, 0.3]"], "data.mean=[0.1, 0.2, 0.3]: wanted 1, one for each channel"),
        (["--data.std", "[0.0]"], "--data.std=[0.0]: wanted positive numbers"),
        (["--data.image_size", "16"], "augmentation.crop='shift'"),
        (["--augmentation.mixup", "-1"], "--augmentation.mixup=-1.0"),
        (["--augmentation.rand_augment", "rand-m9"], "--augmentation.rand-augment='rand-m9': wanted none"),
        ([*EVERYTHING, "--augmentation.rand_augment", "mirror"], "augmentation.rand_augment='mirror'"),
        (["--augmentation.mixup", "1", "--training.gradient_accumulation_steps", "8"], "training.batch_size"),
        (["--augmentation.scale", "[0.5, 0.1]"], "--augmentation.scale=(0.5, 0.1)"),
        (["--augmentation.sizes", "[16, 8]"], "--augmentation.sizes=(16, 8): wanted two numbers of pixels"),
        (["--augmentation.sizes", "[0, 8]"], "--augmentation.sizes=(0, 8): wanted two numbers of pixels"),
        (["--augmentation.sizes", "[8, 16]", "--training.compile", "true"], "training.compile=True: steps' images"),
        (["--training.gradient_accumulation_steps", "3"], "training.batch_size=8"),
        (["--training.min_learning_rate", "1"], "--training.min-learning-rate=1.0: wanted 0 to the learning rate"),
        (["--training.layer_decay", "0"], "--training.layer-decay=0.0"),
        (["--training.warmup_epochs", "1", "--training.warmup_steps", "1"], "--training.warmup-steps=1"),
        (["--training.mixed_precision", "fp16"], "training.mixed_precision='fp16'"),
        (["--training.sample_every", "5"], "--training.sample_every: no such option"),
        (["--evaluation.crop_pct", "2"], "--evaluation.crop-pct=2.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configuration_stops_at_start_with_its_name(tmp_path, data, changes, named):
    with pytest.raises(InputError) as error:
        train(config(tmp_path / "run", data, *changes))
    assert named in str(error.value)
    assert not (tmp_path / "run").exists()


def test_data_without_what_to_be_judged_by(tmp_path, data):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data").glob("t10k*"):
        path.unlink()
    with pytest.raises(InputError, match=r"^data\.validation.*no validation images.*--evaluation\.every-epochs 0"):
        train(config(tmp_path / "run", tmp_path / "data"))
    train(config(tmp_path / "run", tmp_path / "data", "--evaluation.every", 0, "--evaluation.every_epochs", 0))
    assert len(losses(tmp_path / "run")) == 8


def test_a_run_is_not_continued_as_another(tmp_path, data):
    train(config(tmp_path / "run", data, "--training.max_steps", 4))
    for change, named in (("--seed 1", "seed=1"), ("--data.std 0.4", r"data\.std=\[0\.4\]")):
        with pytest.raises(InputError, match=rf"^{named}: the run in .* has"):
            train(config(tmp_path / "run", data, "--resume", "auto", *change.split()))
    fewer = write_idx_folder(tmp_path / "fewer", images=12)
    with pytest.raises(InputError, match=r"^data\.source=.*12 images of 3 classes, and the run .* began with 24 of 3"):
        train(config(tmp_path / "run", fewer, "--resume", "auto"))


def test_a_run_is_not_continued_by_another_kind_of_training(tmp_path, data):
    train(config(tmp_path / "run", data, "--training.max_steps", 1))
    images = diffusion_config(tmp_path / "run", "digits", "--resume", "auto")
    with pytest.raises(InputError, match=r"^output_dir=.*what this command does not take .*; name another folder"):
        train(images)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data):
    with pytest.raises(NonFiniteLoss, match=r"at step \d+, which was not taken"):
        train(config(tmp_path / "run", data, "--training.learning_rate", 1e30, "--training.max_steps", 50))


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_failing_evaluation_warns_and_training_goes_on(tmp_path, data, monkeypatch, capsys):
    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("gspn_dit.training.classification.tally", full)
    train(config(tmp_path / "run", data))
    assert "no evaluation at step 4 (MemoryError: no room); training goes on" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 8 and not accuracies(tmp_path / "run")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_on_made_pictures(tmp_path, path):
    recipe = ClassifierConfig.load(path)
    if recipe.augmentation.crop == "shift":
        source = write_idx_folder(tmp_path / "data", images=4, size=recipe.data.image_size)
    else:
        source = tmp_path / "data"
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                write_images(source / split / name, count=2)
    small = {"gspn-grouped-pico": "{widths: [32], depths: [1]}"}.get(
        recipe.model.name, "{widths: [8], depths: [1], chunks: 2, rank: 2}"
    )
    changes = ["--output_dir", tmp_path / "run", "--data.source", source, "--model.overrides", small]
    changes += ["--training.max_steps", 1, "--training.batch_size", 2, "--training.trackers", "[]"]
    changes += ["--data.num_workers", 0]
    train(ClassifierConfig.load(path, [str(value) for value in changes]))
    assert len(losses(tmp_path / "run")) == len(accuracies(tmp_path / "run")) == 1


def test_the_published_recipe_is_swins():
    for size, rate, drop_path in (("t", 5e-4, 0.2), ("s", 3e-4, 0.4), ("b", 5e-4, 0.5)):
        recipe = ClassifierConfig.load(ROOT / "configs" / "classify" / f"gspn-{size}.yaml")
        training, altered = recipe.training, recipe.augmentation
        assert recipe.model.name == f"gspn-{size}" and not recipe.model.overrides
        assert training.learning_rate == pytest.approx(rate * training.batch_size / 512)
        assert (training.epochs, training.warmup_epochs, training.lr_schedule) == (300, 20, "cosine")
        assert (training.warmup_learning_rate, training.min_learning_rate) == (5e-7, 5e-6)
        assert (training.weight_decay, training.max_grad_norm, training.ema_decay) == (0.05, 5, 0.9999)
        assert (altered.rand_augment, altered.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
        assert (altered.mixup, altered.cutmix, altered.cutmix_probability, altered.mix_probability) == (0.8, 1, 0.5, 1)
        assert (altered.erasing, altered.erasing_mode, altered.label_smoothing) == (0.25, "pixel", 0.1)
        with torch.device("meta"):
            assert create_classifier(recipe.model.name).config.drop_path_rate == drop_path
