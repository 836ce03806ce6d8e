"""The one way every command reads its options: YAML plus ``--key value``.

A command is a dataclass of options and a function that takes it; :func:`command` does the rest. Unknown keys, wrong
types and impossible values stop at start with the key's name and exit status 2, before any work.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from gspn_dit.errors import InputError, Stopped, machine_fault
from gspn_dit.help_page import explain, flag
from gspn_dit.messages import is_first_process, plain_messages, words_beside

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

# What options are called in DiT's and SiT's scripts and elsewhere in the field, and here.
FAMILIAR = {
    "cfg": ["guidance_scale", "sampling.guidance_scale"],
    "cfg_scale": ["guidance_scale", "sampling.guidance_scale"],
    "steps": ["num_inference_steps", "training.max_steps"],
    "num_sampling_steps": ["num_inference_steps", "sampling.num_inference_steps"],
    "num_fid_samples": ["num_images"],
    "num_samples": ["num_images"],
    "image_size": ["height"],
    "resolution": ["image_size", "data.image_size", "height"],
    "global_batch_size": ["training.batch_size"],
    "train_batch_size": ["training.batch_size"],
    "lr": ["training.learning_rate", "learning_rate"],
    "epochs": ["training.max_steps", "steps"],
    "num_train_epochs": ["training.max_steps"],
    "max_train_steps": ["training.max_steps"],
    "fp16": ["mixed_precision", "training.mixed_precision"],
    "bf16": ["mixed_precision", "training.mixed_precision"],
    "ckpt": ["model"],
    "run": ["model"],
    "pretrained_model_name_or_path": ["model"],
    "ckpt_every": ["training.checkpoint_every"],
    "checkpointing_steps": ["training.checkpoint_every"],
    "resume_from_checkpoint": ["resume"],
    "data_path": ["data.source", "data"],
    "feature_path": ["data.source"],
    "features_path": ["data.source", "out"],
    "results_dir": ["output_dir"],
    "sample_dir": ["out"],
    "global_seed": ["seed"],
}


def require(condition: bool, key: str, value: object, wanted: str) -> None:
    """Raise :class:`InputError` naming the key, the value that came and what was wanted, unless the condition holds."""
    if not condition:
        raise InputError(argument=key, value=value, wanted=wanted)


def parse(
    options: type[Options],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    positional: Sequence[str] = (),
    exit_on_error: bool = True,
) -> Options:
    """Build a dataclass of options from `--config FILE.yaml` and `--key value` pairs; later ones win.

    Option names may be written with hyphens or underscores; `positional` names the options that bare words are, in
    their order. On bad input it prints one line and exits with status 2, or raises :class:`InputError` if
    `exit_on_error` is false.
    """
    try:
        return _parsed(options, argv, prog, description, positional)[0]
    except InputError as error:
        if not exit_on_error:
            raise
        fail(error, prog or Path(sys.argv[0]).name)


def command(
    main: Callable[[Options], None] | str,
    options: type[Options],
    *,
    prog: str,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    positional: Sequence[str] = (),
    continues: bool = False,
) -> None:
    """Run a command: parse its options and call it.

    What a person or the machine is the cause of becomes one line: an :class:`InputError` with exit status 2, a full
    disk or memory with 1, Ctrl-C with 130. Anything else is a fault of the program, and keeps its traceback.

    Args:
        main: The command, or where it is, `module:function`, to be imported when the options are known to be right.
        options: The dataclass that it takes.
        prog: Its name.
        argv: Its command line; this process's if not given.
        description: What it does; what `main` says if not given.
        positional: As :func:`parse`.
        continues: Whether the same command, given again, goes on where it was.
    """
    description = description or (getattr(main, "__doc__", None) if callable(main) else None)
    parsed: Options | None = None
    given: list[_Given] = []
    try:
        parsed, given = _parsed(options, argv, prog, description, positional)
        with plain_messages(), words_beside(getattr(parsed, "out", None)):
            if isinstance(main, str):
                module, _, function = main.partition(":")
                getattr(importlib.import_module(module), function)(parsed)
            else:
                main(parsed)
    except InputError as error:
        fail(_as_given(error, given, options), prog)
    except KeyboardInterrupt:
        if is_first_process():
            print(f"{prog}: interrupted{'; the same command goes on here' if continues else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except Stopped as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except Exception as error:
        place = getattr(parsed, "out", None) or getattr(parsed, "output_dir", None)
        if (fault := machine_fault(error, place)) is None:
            raise
        print(f"{prog}: error: {fault}", file=sys.stderr)  # of any process: the others may have no such trouble
        raise SystemExit(1) from None


def fail(error: InputError, prog: str) -> NoReturn:
    """Print the error as one line, of a machine's processes the first alone, and exit with status 2."""
    if is_first_process():
        print(f"{prog}: error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _require_finite(options: DataclassInstance, prefix: str = "") -> None:
    """Raise :class:`InputError` for an infinite number or nan, which no option's range holds."""
    for key, value in ((prefix + f.name, getattr(options, f.name)) for f in dataclasses.fields(options)):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _require_finite(value, f"{key}.")
        numbers = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        finite = all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
        require(finite, key, value, "a finite number")


class _Given(NamedTuple):
    """An option as it was typed."""

    key: str
    value: str
    in_file: bool = False


def _parsed(
    options: type[Options],
    argv: Sequence[str] | None,
    prog: str | None,
    description: str | None,
    positional: Sequence[str],
) -> tuple[Options, list[_Given]]:
    """The options, and what was typed of them. Raises :class:`InputError`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        explain(options, prog, description, positional)
    kinds = _kinds(options)
    given = _given(argv, kinds, positional)
    try:
        for key, value, _ in given:
            require(value != "", key, "", "a value, or leave it out")  # a path of no name is the current folder
        if missing := _required(options) - {key for key, *_ in given}:
            raise InputError(
                "missing", argument=" and ".join(map(flag, sorted(missing))), remedy="--help explains all options"
            )
        return _built(options, given, kinds), given
    except InputError as error:
        raise _as_given(error, given, options) from error


def _required(options: type) -> set[str]:
    """The options that must be given: those without a default."""
    absent = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(options) if f.default is absent and f.default_factory is absent}


@functools.cache
def _parser(options: type) -> Any:
    """What reads the options of a kind: made once, since that takes longer than the reading."""
    from jsonargparse import ArgumentParser  # of the extras: the library works without

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(options, nested_key=None)
    return parser


def _built(options: type[Options], given: list[_Given], kinds: dict[str, Any]) -> Options:
    """The options that were typed, each of its type. Raises :class:`InputError`."""
    parser = _parser(options)
    try:
        namespace = parser.parse_args([f"--{key}={_as_typed(value, kinds.get(key))}" for key, value, _ in given])
        namespace = parser.instantiate(namespace)
    except InputError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise _readable(str(error), given, kinds) from error
    made = options(**{field.name: namespace[field.name] for field in dataclasses.fields(options)})
    _require_finite(made)
    return made


def _as_given(error: InputError, given: list[_Given], options: type) -> InputError:
    """The error with its option as it was typed: `--key`, but for one that a YAML file gave."""
    if error.argument is None or not _is_option(error.argument, _kinds(options)):
        return error
    files = [in_file for key, _, in_file in given if f"{error.argument}.".startswith(f"{key}.")]
    if files and files[-1]:
        return error
    typed = error.about(flag(error.argument))
    if error.value is None and files:
        typed.value = _NULL
    elif error.value is None:  # of an option that nobody gave
        typed.value, typed.problem = ..., f"missing; {error.problem}" if error.problem else "missing"
    return typed


class _Null:
    """None as it is typed."""

    def __repr__(self) -> str:
        return "null"


_NULL = _Null()


def _kinds(options: type, prefix: str = "") -> dict[str, Any]:
    """The type of every option by its dotted key."""
    kinds: dict[str, Any] = {}
    for key, kind in get_type_hints(options).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            kinds |= _kinds(kind, f"{prefix}{key}.")
        else:
            kinds[prefix + key] = kind
    return kinds


def _given(argv: Sequence[str], kinds: dict[str, Any], positional: Sequence[str] = ()) -> list[_Given]:
    """What a command line gives, with what its YAML files give in their places."""
    given, words, bare = [], list(argv), list(positional)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") and _is_option(_key(word), kinds):
                raise InputError("options have two hyphens", argument=word, wanted=f"-{word}")
            several = bool(bare) and get_origin(kinds[bare[0]]) is list  # all words up to the next option
            if several and not word.startswith("-"):
                listed = [word]
                while words and not words[0].startswith("-"):
                    listed.append(words.pop(0))
                given.append(_Given(bare.pop(0), json.dumps(listed, ensure_ascii=False)))
                continue
            if bare and not several:
                given.append(_Given(bare.pop(0), word))
                continue
            if "=" in word and _is_option(_key(word), kinds):
                raise InputError(f"{word!r}: options have two hyphens", wanted=f"--{word}")
            if word.endswith((".yaml", ".yml")):
                raise InputError(argument=repr(word), wanted=f"--config {word}")
            after = f" after {flag(given[-1].key)} {given[-1].value}" if given else ""
            wanted = "`--option value`, several values with commas between them"
            raise InputError(argument=f"{word!r}{after}", wanted=wanted)
        typed, equals, value = word.partition("=")
        key = _key(typed)
        if key != "config":
            _check_key(key, typed, kinds, flag)
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif {bool, str} <= set(get_args(kinds.get(key))):  # a switch that may be told more
                value = "true"
            else:
                raise InputError("no value", argument=typed, wanted=_wanted(kinds.get(key, str)))
        given += _from_yaml(value, kinds) if key == "config" else [_Given(key, value)]
    return given


def _key(typed: str) -> str:
    """The option that was typed, with hyphens or underscores."""
    return typed.partition("=")[0].lstrip("-").replace("-", "_")


def _from_yaml(path: str, kinds: dict[str, Any]) -> list[_Given]:
    """What a YAML file gives, values as they are written: `no` is a word there, not false."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", argument="--config", value=path) from error
    except yaml.MarkedYAMLError as error:
        if error.problem_mark is None:
            raise
        problem = f"not YAML: line {error.problem_mark.line + 1}, {error.problem}"
        raise InputError(problem, argument="--config", value=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not YAML ({' '.join(str(error).split())})", argument="--config", value=path) from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise InputError(argument="--config", value=path, wanted="lines of `option: value`")

    def pairs(node: yaml.Node, key: str) -> Iterator[_Given]:
        if key not in kinds and isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                yield from pairs(value, f"{key}.{name.value}".removeprefix("."))
        elif node.value or not any(known.startswith(key + ".") for known in kinds):  # else a group of nothing
            _check_key(key, f"{path}: {key}", kinds, str)
            if isinstance(node, yaml.ScalarNode):
                text = node.value if node.value or node.style else "null"
            else:
                if isinstance(node, yaml.CollectionNode):
                    node.flow_style = True
                text = yaml.serialize(node, width=math.inf).strip()
            yield _Given(key, text, in_file=True)

    return list(pairs(root, "")) if root else []


def _is_option(key: str, kinds: dict[str, Any]) -> bool:
    """Whether there is an option called so, or one that is a dictionary with such a key."""
    return key in kinds or any(get_origin(kind) is dict and key.startswith(f"{name}.") for name, kind in kinds.items())


def _check_key(key: str, shown: str, kinds: dict[str, Any], spell: Callable[[str], str]) -> None:
    """Raise :class:`InputError` for an option that there is not, as it was typed, with one that it may have meant."""
    if _is_option(key, kinds):
        return
    familiar = [known for known in FAMILIAR.get(key.rpartition(".")[2], ()) if known in kinds]
    endings = [known for known in kinds if known.endswith("." + key) or known.startswith(key + ".")]
    close = familiar or endings or difflib.get_close_matches(key, ["config", *kinds], n=1)
    remedy = f"did you mean {spell(close[0])}?" if close else "--help lists them"
    raise InputError("no such option", argument=shown, remedy=remedy)


def _as_typed(value: str, kind: Any) -> str:
    """A value as a person types it, in the form the parser takes: 1e5 for a whole number, 0,1 for a list."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if int in kinds and re.fullmatch(r"[0-9]+\.?[0-9]*[eE]\+?[0-9]{1,2}", value) and float(value).is_integer():
        return str(int(float(value)))
    for each in kinds:
        if get_origin(each) is dict and not value.lstrip().startswith("{") and "=" in value:  # a=1,b=2
            pairs = (item.partition("=") for item in _items(value))
            return f"{{{', '.join(f'{name.strip()}: {text}' for name, _, text in pairs)}}}"
        if get_origin(each) in (list, tuple) and value != "null":
            inner = get_args(each)[0]
            items = [json.dumps(item, ensure_ascii=False) if inner is str else item for item in _items(value)]
            return f"[{','.join(_as_typed(item, inner) for item in items)}]"
    return value


def _items(text: str) -> list[str]:
    """The items of a list: between commas, with or without brackets around them, and quotes where one has a comma."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    if not (text := text.removesuffix(",")):
        return []
    # the last match is the empty one after the last item
    found = re.findall(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,]*?)\s*(?:,|$)""", text)[:-1]
    return [str(yaml.safe_load(item)) if re.fullmatch("(['\"]).*\\1", item) else item for item in found]


def _readable(message: str, given: list[_Given], kinds: dict[str, Any]) -> InputError:
    """The parser's message for the person: the option, the value that came, and what is wanted."""
    named = re.match(r'Parser key "([^"]+)"', message)
    if named is None or named[1] not in kinds:
        return InputError(" ".join(message.split()))
    values = [value for key, value, _ in given if key == named[1]]
    value = values[-1] if values else None
    return InputError(argument=named[1], value=value, wanted=_wanted(kinds[named[1]]))


def _wanted(kind: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is Literal:
        *first, last = get_args(kind)
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(kind) is tuple:
        return ",".join(_wanted(each).removeprefix("a ") for each in get_args(kind))
    if get_origin(kind) is list:
        return f"{_wanted(get_args(kind)[0])}, or several with commas between them"
    if get_origin(kind) is dict:
        return "{name: value, …}"
    return words.get(kind) or " or ".join(_wanted(each) for each in get_args(kind))
