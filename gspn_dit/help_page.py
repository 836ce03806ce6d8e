"""What `--help` prints of a command: its options, by the groups and with the words of their dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints


def flag(key: str) -> str:
    """An option as the command line has it."""
    return "--" + key.replace("_", "-")


def explain(options: type, prog: str | None, description: str | None, positional: Sequence[str]) -> NoReturn:
    """Print what a command does and what each option is, and end with status 0."""
    bare = "".join(f"{word.upper()} " for word in positional)
    page = argparse.ArgumentParser(prog=prog, usage=f"%(prog)s {bare}[--option value …]", description=description)
    page.add_argument("--config", metavar="FILE", help="a YAML file of the options below; later ones win")
    _explain_group(page, options, "")
    page.parse_args(["--help"])
    raise SystemExit(0)


def _explain_group(page: argparse.ArgumentParser, options: type, prefix: str) -> None:
    """Add a dataclass's options to a page, those of the dataclasses in it after its own."""
    import docstring_parser

    said = docstring_parser.parse(options.__doc__ or "")
    kinds = [kind for kind in reversed(options.__mro__) if dataclasses.is_dataclass(kind)]
    params = [param for kind in kinds for param in docstring_parser.parse(kind.__doc__ or "").params]
    explained = {param.arg_name: " ".join((param.description or "").split()) for param in params}
    group, inner = page.add_argument_group((said.short_description or "options").rstrip(".")), []
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        key, kind = prefix + field.name, hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            inner.append((kind, f"{key}."))
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        known = "" if default is None else f" (default: {_shown(default)})"
        known = " (required)" if default is dataclasses.MISSING else known
        text = (explained.get(field.name, "") + known).replace("%", "%%")
        group.add_argument(flag(key), metavar=_placeholder(kind), help=text)
    for kind, prefix in inner:
        _explain_group(page, kind, prefix)


def _placeholder(kind: Any) -> str:
    """What stands for an option's value in its explanation."""
    words = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) in (list, tuple):
        ends = "…" if get_origin(kind) is list else _placeholder(get_args(kind)[-1])
        return f"{_placeholder(get_args(kind)[0])},{ends}"
    if get_origin(kind) is dict:
        return "{NAME: VALUE}"
    return words.get(kind) or "|".join(_placeholder(each) for each in get_args(kind) if each is not type(None))


def _shown(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value)) or "[]"
    return str(value).lower() if isinstance(value, bool) else str(value)
