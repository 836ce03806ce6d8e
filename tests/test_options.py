"""Options as a person types them: what is taken, and what is answered when it cannot be."""

import dataclasses
import importlib
import json
import os
import typing

import docstring_parser
import pytest

from gspn_dit.commands import VERBS, BudgetOptions, ExportOptions, ModelsOptions, SampleOptions
from gspn_dit.config import Config
from gspn_dit.errors import InputError, renamed
from gspn_dit.options import parse


def options(*argv, of=Config):
    return parse(of, argv, exit_on_error=False)


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_what_is_typed_is_understood():
    assert options("--training.max-steps", "1e5").training.max_steps == 100_000
    assert options("--training.max_steps=2.5e3").training.max_steps == 2500
    assert options("--training.trackers", "tensorboard").training.trackers == ["tensorboard"]
    assert options("--training.trackers", "[]").training.trackers == []
    for interval in ("0.1,0.9", "[0.1,0.9]", "[0.1, 0.9]"):
        assert options("--sampling.guidance-interval", interval).sampling.guidance_interval == (0.1, 0.9)
        assert options("--guidance-interval", interval, of=SampleOptions).guidance_interval == (0.1, 0.9)
    assert options("--guidance-interval", "null", of=SampleOptions).guidance_interval is None
    assert options("--out", "2024", of=SampleOptions).out == "2024"
    overrides = options("--model.overrides", "{depth: 2}", "--model.overrides.num-groups", "3").model.overrides
    assert overrides == {"depth": 2, "num_groups": 3}


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a,b", ["a", "b"]),
        ("[a,b]", ["a", "b"]),
        (" [ a, b ,] ", ["a", "b"]),
        ("a", ["a"]),
        ("[]", []),
        ("a: b,#c,*d,{e,no,null,1", ["a: b", "#c", "*d", "{e", "no", "null", "1"]),
        ("""['a, b',"c]",it's,'it''s']""", ["a, b", "c]", "it's", "it's"]),
        ("größe,日本", ["größe", "日本"]),
    ],
)
def test_a_list_has_commas_and_brackets_if_you_like(tmp_path, text, items):
    assert options("--names", text, of=ModelsOptions).names == items
    of_file = json.dumps({"names": items}, ensure_ascii=False)  # is YAML, too
    assert options("--config", written(tmp_path, of_file), of=ModelsOptions).names == items


def test_class_labels_are_a_list_too():
    for typed in ("3,7", "[3,7]"):
        assert options("--class-labels", typed, of=SampleOptions).class_labels == "3,7"


def test_lists_of_numbers():
    for typed in ("1, 8,", "[1,8]"):
        assert options("--gpus", typed, of=BudgetOptions).gpus == [1, 8]
    assert options("--batch-size", "1000", "--gpus", "1e1,1e3", of=BudgetOptions).gpus == [10, 1000]


def test_yaml_words_are_words(tmp_path):
    path = written(
        tmp_path,
        "resume: no\ntraining: {mixed_precision: no, trackers: tensorboard, max_steps: 1e3}\n"
        "model:\n  overrides: {global_layers: [0, -1], chunk: null}\n"
        "sampling:\n  sampler:\n  guidance_interval: [0.2, 0.7]\ndata:\n",
    )
    config = options("--config", path, "--training.max-steps", "7")
    assert (config.resume, config.training.mixed_precision) == ("no", "no")
    assert (config.training.trackers, config.training.max_steps) == (["tensorboard"], 7)
    assert config.model.overrides == {"global_layers": [0, -1], "chunk": None}
    assert (config.sampling.sampler, config.sampling.guidance_interval) == (None, (0.2, 0.7))
    assert options("--training.max-steps", "7", "--config", path).training.max_steps == 1000  # later ones win


BENCHMARKS = (
    "block_budget",
    "classifier_throughput",
    "depthwise",
    "higher",
    "operator",
    "quality",
    "resolution",
    "store",
)


def own_options(kind):
    """A command's dataclass and those within it."""
    hints = typing.get_type_hints(kind).values()
    return [kind, *(each for hint in hints if dataclasses.is_dataclass(hint) for each in own_options(hint))]


@pytest.mark.parametrize("name", [*VERBS, *BENCHMARKS])
def test_every_option_of_every_command_is_explained(name):
    kind = VERBS[name].options if name in VERBS else importlib.import_module(f"benchmarks.{name}").Options
    for each in own_options(kind):
        said = [docstring_parser.parse(kind.__doc__ or "") for kind in each.__mro__ if dataclasses.is_dataclass(kind)]
        explained = {param.arg_name: param.description for page in said for param in page.params}
        for field in dataclasses.fields(each):
            assert explained.get(field.name), f"{each.__qualname__}.{field.name}"


@dataclasses.dataclass
class Listed:
    """Made options.

    Args:
        files: Several words.
        count: A number.
    """

    files: list[str]
    count: int = 1


def test_bare_words_are_a_list_up_to_the_next_option():
    for argv in (["a b.png", "[c].png", "--count", "2"], ["--count", "2", "a b.png", "[c].png"]):
        assert parse(Listed, argv, positional=["files"], exit_on_error=False) == Listed(["a b.png", "[c].png"], 2)
    assert parse(Listed, ["--files", "a,b"], positional=["files"], exit_on_error=False).files == ["a", "b"]
    for argv, said in ((["a", "--count", "2", "b"], "'b' after --count 2"), (["-x"], "'-x'"), ([], "--files: missing")):
        with pytest.raises(InputError, match=said):
            parse(Listed, argv, positional=["files"], exit_on_error=False)


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_file_is_no_options(tmp_path, text):
    assert options("--config", written(tmp_path, text)) == Config()


def test_what_is_saved_is_loaded(tmp_path):
    config = options(
        "--model.overrides",
        "{name: 'no', sizes: [1, 2], ratio: 1.0e-5}",
        "--output-dir",
        "a: b, #c",
        "--sampling.sampler",
        "ddim",
        "--seed",
        "2147483647",
    )
    config.save(tmp_path / "config.yaml")
    assert dataclasses.asdict(Config.load(tmp_path / "config.yaml")) == dataclasses.asdict(config)
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        ("--training.max-stepz 3", "--training.max-stepz: no such option; did you mean --training.max-steps?"),
        ("--training.max_stepz 3", "--training.max_stepz: no such option"),
        ("--batch-size 3", "--batch-size: no such option; did you mean --training.batch-size?"),
        ("--model gspn-dit-s-2", "--model: no such option; did you mean --model.name?"),
        ("--lr 1e-4", "--lr: no such option; did you mean --training.learning-rate?"),
        ("--training.lr 1e-4", "did you mean --training.learning-rate?"),
        ("--cfg-scale 4", "--cfg-scale: no such option; did you mean --sampling.guidance-scale?"),
        ("--global-batch-size 256", "did you mean --training.batch-size?"),
        ("--training.compile", "--training.compile: no value; wanted true or false"),
        ("--training.compile --seed 1", "--training.compile: no value; wanted true or false"),
        ("--training.max-steps many", "--training.max-steps='many': wanted a whole number"),
        ("--training.max-steps 1.5", "--training.max-steps='1.5': wanted a whole number"),
        ("--training.learning-rate fast", "--training.learning-rate='fast': wanted a number"),
        ("--training.learning-rate .inf", "--training.learning-rate=inf: wanted a finite number"),
        ("--training.weight-decay .nan", "--training.weight-decay=nan"),
        ("--training.max-grad-norm 1e999", "--training.max-grad-norm=inf: wanted a finite number"),
        ("--training.ema-decay .nan", "--training.ema-decay=nan"),
        ("--diffusion.class-dropout .nan", "--diffusion.class-dropout=nan"),
        ("--sampling.guidance-scale .inf", "--sampling.guidance-scale=inf: wanted 1 (none) or more"),
        ("--sampling.guidance-interval .nan,1", "--sampling.guidance-interval=(nan, 1.0)"),
        ("--evaluation.guidance-scale .nan", "--evaluation.guidance-scale=nan: wanted 1 (none) or more"),
        ("--training.posthoc-ema-sigma-rels 0.1,.nan", "--training.posthoc-ema-sigma-rels=[0.1, nan]"),
        ("--resume maybe", "--resume='maybe': wanted auto or no"),
        ("--sampling.guidance-interval 0.5", "--sampling.guidance-interval='0.5': wanted number,number"),
        ("--seed -1", "--seed=-1: wanted a whole number from 0"),
        ("--seed 2147483648", "--seed=2147483648: wanted a whole number from 0"),
        ("runs/digits", "'runs/digits': wanted `--option value`"),
        ("-seed 3", "-seed: options have two hyphens; wanted --seed"),
        ("seed=3", "'seed=3': options have two hyphens; wanted --seed=3"),
        ("configs/digits.yaml", "'configs/digits.yaml': wanted --config configs/digits.yaml"),
        ("--configs x.yaml", "--configs: no such option; did you mean --config?"),
        ("--fp16", "did you mean --training.mixed-precision?"),
        ("--output-dir=", "--output-dir='': wanted a value"),
        ("--model.overrides {a", "--model.overrides='{a': wanted {name: value, …}"),
        ("--evaluation.every 10", "--evaluation.reference: missing; wanted images or statistics"),
        ("--training.mixed-precision fp32", "--training.mixed-precision='fp32': wanted "),
        ("--config nowhere.yaml", "--config='nowhere.yaml': cannot be read"),
    ],
)
def test_the_answer_names_what_was_typed_and_what_is_wanted(argv, answer):
    with pytest.raises(InputError) as refused:
        options(*argv.split())
    assert answer in str(refused.value)
    assert not any(words in str(refused.value) for words in ("Parser key", "typing.", "<class", "\n"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("training:\n  max_stepz: 3\n", ".yaml: training.max_stepz: no such option; did you mean training.max_steps?"),
        ("trainig:\n  max_steps: 3\n", ".yaml: trainig.max_steps: no such option; did you mean training.max_steps?"),
        ("training: [1\nseed: 2\n", "config.yaml': not YAML: line 2"),
        ("hello\n", "config.yaml': wanted lines of `option: value`"),
        ("- seed\n", "config.yaml': wanted lines of `option: value`"),
        ("seed: {a: 1}\n", "seed='{a: 1}': wanted a whole number"),
        ("training: {batch_size: 0}\n", "training.batch_size=0: wanted 1 or more"),
        ("model: gspn-dit-s-2\n", "config.yaml: model: no such option; did you mean model.name?"),
    ],
)
def test_a_file_is_named_with_what_is_wrong_in_it(tmp_path, text, answer):
    with pytest.raises(InputError) as refused:
        options("--config", written(tmp_path, text))
    assert answer in str(refused.value)


def test_words_left_over_are_to_be_joined_by_commas():
    with pytest.raises(InputError, match=r"'7' after --class-labels 3: .*commas"):
        options("--class-labels", "3", "7", of=SampleOptions)


def test_a_switch_that_may_be_told_more():
    for argv in (["--npz", "--out", "folder/"], ["--out", "folder/", "--npz"], ["--out", "folder", "--npz", "true"]):
        assert options(*argv, of=SampleOptions).npz == "folder.npz"
    assert options("--npz", "other.npz", of=SampleOptions).npz == "other.npz"
    assert options("--out", "folder", "--npz", "false", of=SampleOptions).npz is None


def test_bare_words_are_the_options_that_a_command_names():
    def given(*argv):
        return parse(ExportOptions, argv, positional=("model", "out"), exit_on_error=False)

    assert given("run", "folder") == given("--model", "run", "--out", "folder") == ExportOptions("run", "folder")
    assert given("run", "--out", "folder") == ExportOptions("run", "folder")
    with pytest.raises(InputError, match="'third'"):
        given("run", "folder", "third")
    with pytest.raises(InputError, match=r"^--out: missing"):
        given("run")
    with pytest.raises(InputError, match=r"^--model and --out: missing"):
        given()


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, ["--help"], prog="train_dit.py")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--training.max-steps N" in printed
    assert "--training.trackers TEXT,…" in printed
    assert "trackers+" not in printed  # which is refused
    assert "--training CONFIG" not in printed  # the group, which takes no value


def test_a_files_overrides_can_be_taken_back(tmp_path):
    path = written(tmp_path, "model: {overrides: {width: 128, num_groups: 2}}")
    assert options("--config", path, "--model.overrides", "{}").model.overrides == {}
    assert options("--config", path, "--model.overrides.width", "64").model.overrides == {"width": 64, "num_groups": 2}


def test_an_error_about_an_argument_names_the_option_it_came_from():
    def refuse(problem, **fields):
        with renamed(source="data.source"):
            raise InputError(problem, **fields)

    with pytest.raises(InputError, match=r"^data.source='x': missing, source=y$"):
        refuse("missing, source=y", argument="source", value="x")
    with pytest.raises(InputError, match=r"^split='x': no$"):
        refuse("no", argument="split", value="x")
    with pytest.raises(InputError, match=r"^source='x': of no argument$"):
        refuse("source='x': of no argument")
    with pytest.raises(InputError, match=r"^model.overrides.width=0: no$"), renamed("model.overrides."):
        raise InputError("no", argument="width", value=0)
