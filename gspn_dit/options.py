"""The one way every command reads its options: YAML plus ``--key value``.

A command is a dataclass of options and a function that takes it; :func:`command` does the rest. Unknown keys, wrong
types and impossible values stop at start with the key's name and exit status 2, before any work.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace

from gspn_dit.errors import InputError

Options = TypeVar("Options")

# What options are called in DiT's and SiT's scripts and elsewhere in the field, and here.
FAMILIAR = {
    "cfg_scale": ["guidance_scale", "sampling.guidance_scale"],
    "num_sampling_steps": ["num_inference_steps", "sampling.num_inference_steps"],
    "num_fid_samples": ["num_images"],
    "global_batch_size": ["training.batch_size"],
    "lr": ["training.learning_rate", "learning_rate"],
    "epochs": ["training.max_steps"],
    "ckpt": ["model"],
    "ckpt_every": ["training.checkpoint_every"],
    "data_path": ["data.source", "data"],
    "results_dir": ["output_dir"],
    "sample_dir": ["out"],
    "global_seed": ["seed"],
}


def require(condition: bool, key: str, value: object, wanted: str) -> None:
    """Raise :class:`InputError` naming the key, the value that came and what was wanted, unless the condition holds."""
    if not condition:
        raise InputError(f"{key}={value!r}: wanted {wanted}")


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
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = f"%(prog)s {' '.join(map(str.upper, positional))} [--option value …]" if positional else None
    parser = ArgumentParser(prog=prog, usage=usage, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", help="a YAML file of the options below")
    parser.add_class_arguments(options, nested_key=None)
    kinds = _kinds(options)
    if {"-h", "--help"} & set(argv):
        for action in parser._actions:  # a group is no option: its options are
            if any(key.startswith(f"{action.dest}.") for key in kinds):
                action.help = SUPPRESS
        parser.parse_args(["--help"])
    try:
        given = _given(argv, kinds, positional)
        for key, value in given:
            require(value != "", key, "", "a value, or leave it out")
        try:
            namespace: Namespace = parser.parse_args([f"--{key}={value}" for key, value in given])
            namespace = parser.instantiate(namespace)
        except InputError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise InputError(_readable(str(error), given, kinds)) from error
        values = {f.name: namespace[f.name] for f in dataclasses.fields(options)}
        return options(**values)
    except InputError as error:
        if not exit_on_error:
            raise
        fail(error, parser.prog)


def command(
    main: Callable[[Options], None],
    options: type[Options],
    *,
    prog: str,
    argv: Sequence[str] | None = None,
    positional: Sequence[str] = (),
) -> None:
    """Run a command: parse its options, call it, and turn an :class:`InputError` into one line and exit status 2."""
    parsed = parse(options, argv, prog=prog, description=(main.__doc__ or "").strip() or None, positional=positional)
    try:
        main(parsed)
    except InputError as error:
        fail(error, prog)


def fail(error: InputError, prog: str) -> None:
    """Print the error as one line, of a machine's processes the first alone, and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _kinds(options: type, prefix: str = "") -> dict[str, Any]:
    """The type of every option by its dotted key."""
    kinds: dict[str, Any] = {}
    for key, kind in get_type_hints(options).items():
        kinds |= _kinds(kind, f"{prefix}{key}.") if dataclasses.is_dataclass(kind) else {prefix + key: kind}
    return kinds


def _given(argv: Sequence[str], kinds: dict[str, Any], positional: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The (key, value) pairs of a command line, those of its YAML files in their places."""
    given, words, bare = [], list(argv), list(positional)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if bare:
                given.append((bare.pop(0), word))
                continue
            after = f" after --{given[-1][0].replace('_', '-')} {given[-1][1]}" if given else ""
            raise InputError(f"{word!r}{after}: wanted `--option value`, several values with commas between them")
        typed, equals, value = word.partition("=")
        key = typed[2:].replace("-", "_")
        if key != "config":
            _check_key(key, typed, kinds, lambda known: "--" + known.replace("_", "-"))
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif {bool, str} <= set(get_args(kinds.get(key))):  # a switch that may be told more
                value = "true"
            else:
                raise InputError(f"{typed}: no value; wanted {_wanted(kinds.get(key, str))}")
        given += _from_yaml(value, kinds) if key == "config" else [(key, _as_typed(value, kinds.get(key)))]
    return given


def _from_yaml(path: str, kinds: dict[str, Any]) -> list[tuple[str, str]]:
    """The (key, value) pairs of a YAML file, values as they are written: `no` is a word there, not false."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"config={path!r}: cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        raise InputError(f"config={path!r}: not YAML: line {error.problem_mark.line + 1}, {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config={path!r}: not YAML ({' '.join(str(error).split())})") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise InputError(f"config={path!r}: wanted lines of `option: value`")

    def pairs(node: yaml.Node, key: str) -> Iterator[tuple[str, str]]:
        if key not in kinds and isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                yield from pairs(value, f"{key}.{name.value}".removeprefix("."))
        elif node.value or not any(known.startswith(key + ".") for known in kinds):  # else a group of nothing
            _check_key(key, f"{path}: {key}", kinds, str)
            if isinstance(node, yaml.ScalarNode):
                text = node.value if node.value or node.style else "null"
            else:
                node.flow_style = True
                text = yaml.serialize(node, width=math.inf).strip()
            yield key, _as_typed(text, kinds.get(key))

    return list(pairs(root, "")) if root else []


def _check_key(key: str, shown: str, kinds: dict[str, Any], spell: Callable[[str], str]) -> None:
    """Raise :class:`InputError` for an option that there is not, as it was typed, with one that it may have meant."""
    if key in kinds or any(get_origin(kind) is dict and key.startswith(name + ".") for name, kind in kinds.items()):
        return
    familiar = [known for known in FAMILIAR.get(key.rpartition(".")[2], ()) if known in kinds]
    endings = [known for known in kinds if known.endswith("." + key) or known.startswith(key + ".")]
    close = familiar or endings or difflib.get_close_matches(key, kinds, n=1)
    remedy = f"did you mean {spell(close[0])}?" if close else "--help lists them"
    raise InputError(f"{shown}: no such option; {remedy}")


def _as_typed(value: str, kind: Any) -> str:
    """A value as a person types it, in the form the parser takes: 1e5 for a whole number, 0,1 for a list."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if int in kinds and re.fullmatch(r"[0-9]+\.?[0-9]*[eE]\+?[0-9]{1,2}", value) and float(value).is_integer():
        return str(int(float(value)))
    if any(get_origin(each) in (list, tuple) for each in kinds) and value != "null" and not value.startswith("["):
        return f"[{value}]"
    return value


def _readable(message: str, given: list[tuple[str, str]], kinds: dict[str, Any]) -> str:
    """The parser's message for the person: the option, the value that came, and what is wanted."""
    named = re.match(r'Parser key "([^"]+)"', message)
    if named is None or named[1] not in kinds:
        return " ".join(message.split())
    values = [value for key, value in given if key == named[1]]
    return f"{named[1]}={values[-1] if values else None!r}: wanted {_wanted(kinds[named[1]])}"


def _wanted(kind: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{','.join(_wanted(each).removeprefix('a ') for each in get_args(kind))}]"
    if get_origin(kind) is list:
        return "a list, [first,second]"
    if get_origin(kind) is dict:
        return "{name: value, …}"
    return words.get(kind) or " or ".join(_wanted(each) for each in get_args(kind))
