"""An InputError holds what it says, wherever it comes from; what the library says is for `logging`, or a command."""

import logging
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from made.launched import run_warm
from torch.utils.data import Dataset

from gspn_dit.data.workers import load
from gspn_dit.errors import InputError, renamed
from gspn_dit.messages import plain_messages
from gspn_dit.models.registry import NoSuchOption
from gspn_dit.options import command, parse
from gspn_dit.precision import Precision
from gspn_dit.processes import SharedInputError, on_every_process, on_main_process

FIELDS = {"problem": "no", "argument": "size", "value": Path("a"), "wanted": "a side", "remedy": "give 32"}


def refuse():
    raise InputError(FIELDS["problem"], **{name: value for name, value in FIELDS.items() if name != "problem"})


@pytest.fixture
def error():
    with pytest.raises(InputError) as raised:
        refuse()
    return raised.value


@pytest.mark.parametrize(
    ("problem", "fields", "line"),
    [
        ("no", {}, "no"),
        ("no", {"wanted": "yes", "remedy": "say it"}, "no; wanted yes; say it"),
        ("no", {"argument": "a"}, "a: no"),
        ("no", {"argument": "a", "value": None}, "a=None: no"),
        (None, {"argument": "a", "value": "x", "wanted": "y"}, "a='x': wanted y"),
        (None, {"argument": "a", "value": 1, "wanted": "2", "remedy": "add 1"}, "a=1: wanted 2; add 1"),
        ("no", {"argument": "a", "value": Path("b/c")}, "a='b/c': no"),
        ("no", {"argument": "a", "value": "x" * 200}, f"a='{'x' * 200}': no"),  # a path is of use when it is whole
        ("no", {"argument": "a", "value": ["x"] * 99}, "a=" + repr(["x"] * 99)[:77] + "…: no"),
    ],
)
def test_it_is_rendered_of_what_there_is(problem, fields, line):
    assert str(InputError(problem, **fields)) == line


def test_its_fields_are_kept_under_another_name_and_when_it_is_pickled(error):
    assert isinstance(error, ValueError) and vars(error) == FIELDS
    other = error.about("data.size")
    assert vars(other) == {**FIELDS, "argument": "data.size"} and vars(error) == FIELDS
    for each in (error, other, NoSuchOption("no", argument="depht", value=2)):
        back = pickle.loads(pickle.dumps(each))
        assert type(back) is type(each) and vars(back) == vars(each) and str(back) == str(each)


def test_an_argument_is_renamed_and_no_text_is_read(error):
    with pytest.raises(InputError) as raised, renamed(size="data.size"):
        raise error
    assert vars(raised.value) == {**FIELDS, "argument": "data.size"}
    with pytest.raises(InputError) as raised, renamed("model.overrides.", size="data.size"):
        raise InputError("size=3: no")
    assert str(raised.value) == "size=3: no" and raised.value.argument is None
    with pytest.raises(NoSuchOption, match=r"^model\.overrides\.depht=2: no$"), renamed("model.overrides."):
        raise NoSuchOption("no", argument="depht", value=2)


class Refusing(Dataset):
    """Numbers, of which one cannot be had."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4:
            refuse()
        return torch.tensor(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_a_process_that_reads_data_keeps_its_fields(num_workers):
    batches, seen = load(Refusing(), [[0, 1], [2, 3], [4, 5]], num_workers), []
    with pytest.raises(InputError) as raised:
        seen.extend(batch.tolist() for batch in batches)
    assert seen == [[0, 1], [2, 3]] or not seen
    assert vars(raised.value) == FIELDS


@pytest.mark.parametrize("share", [on_every_process, lambda work: on_main_process(work, is_main=True)])
def test_a_shared_error_keeps_its_fields(share):
    with pytest.raises(SharedInputError) as raised:
        share(refuse)
    assert vars(raised.value) == FIELDS


def share_with_others():
    """On two processes: an error of the second alone, as both raise it."""
    state = PartialState(cpu=True)
    with pytest.raises(SharedInputError) as raised:
        on_every_process(refuse if state.process_index == 1 else int)
    assert vars(raised.value) == FIELDS
    print(f"process {state.process_index} raises it too", flush=True)
    with plain_messages():
        logging.getLogger("gspn_dit.made").info("said once")
    state.destroy_process_group()


@pytest.mark.slow
def test_an_error_of_another_process_keeps_its_fields_and_one_process_speaks():
    printed = run_warm(2, __file__)
    assert "process 0 raises it too" in printed and "process 1 raises it too" in printed
    assert printed.count("said once") == 1


SAID = Precision("no", "no", True, "for a test")


@dataclass
class Options:
    """Options of a made command.

    Args:
        count: How many.
        size: Of each.
    """

    count: int = 1
    size: int | None = None


def test_a_library_call_says_nothing_until_logging_is_configured(capsys, caplog):
    SAID.say()
    assert capsys.readouterr() == ("", "") and not caplog.records
    with caplog.at_level(logging.INFO, logger="gspn_dit"):
        SAID.say()
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("gspn_dit.precision", "computing in float32 (mixed_precision no)")
    assert capsys.readouterr() == ("", "")


def test_a_command_prints_what_the_library_says_once_and_leaves_logging_as_it_was(capsys, monkeypatch):
    logger = logging.getLogger("gspn_dit.made")

    def main(options):
        logger.debug("a detail")
        logger.info("a line with 100% in it")
        logger.info("a line beside", extra={"stderr": True})
        logger.warning("few\nimages")
        with plain_messages():  # of a command in it
            SAID.say()

    top = logging.getLogger("gspn_dit")
    before = (top.level, top.propagate, list(top.handlers))
    command(main, Options, prog="made", argv=[])
    out, err = capsys.readouterr()
    assert out.splitlines() == ["a line with 100% in it", "computing in float32 (mixed_precision no)"]
    assert err.splitlines() == ["a line beside", "warning: few images"]
    assert (top.level, top.propagate, list(top.handlers)) == before
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setenv("LOCAL_RANK", "1")
    command(main, Options, prog="made", argv=[])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "fields"),
    [
        (["--count", "many"], {"argument": "--count", "value": "many", "wanted": "a whole number"}),
        (["--cuont", "1"], {"argument": "--cuont", "problem": "no such option", "remedy": "did you mean --count?"}),
    ],
)
def test_an_options_error_holds_the_option_as_it_was_typed(argv, fields):
    with pytest.raises(InputError) as raised:
        parse(Options, argv, exit_on_error=False)
    assert {name: getattr(raised.value, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("argv", "value", "line"),
    [
        (["--size", "3"], 3, "--size=3: no; wanted more"),
        (["--size", "null"], None, "--size=null: no; wanted more"),
        ([], None, "--size: missing; no; wanted more"),
    ],
)
def test_a_value_is_said_as_it_was_typed(capsys, argv, value, line):
    def main(options):
        raise InputError("no", argument="size", value=options.size, wanted="more")

    with pytest.raises(SystemExit):
        command(main, Options, prog="made", argv=argv)
    assert capsys.readouterr().err == f"made: error: {line}\n"


if __name__ == "__main__":
    sys.exit(share_with_others())
