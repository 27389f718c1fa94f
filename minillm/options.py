"""Fields of a dataclass as options of a command, with the docstring under each field as help. It knows no command."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from minillm.errors import RequestError

__all__ = ["field_docs", "with_fields"]

DICTS = ("logit_bias",)
"""Fields that are given as several TOKEN=NUMBER."""


def field_docs(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = " ".join(str(node.value.value).split())
            name = ""
    return docs


def option_of(field: Field[Any], hint: Any, help_text: str, panel: str) -> inspect.Parameter:
    """A dataclass field as a parameter that Typer makes an option of; of a field's several forms, the list.

    A dict is given as KEY=VALUE, several times.
    """
    forms = get_args(hint)
    kind = next((form for form in forms if get_origin(form) is list), str | None if str in forms else hint)
    if field.name in DICTS:
        kind, help_text = list[str], f"{help_text} Give it as TOKEN=NUMBER, again for each token."
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if field.default == () else field.default,
        annotation=Annotated[kind, typer.Option(help=help_text, rich_help_panel=panel)],
    )


def options_of(config: type) -> list[inspect.Parameter]:
    """All fields of a dataclass as options."""
    docs, hints = field_docs(config), get_type_hints(config)
    return [option_of(f, hints[f.name], docs[f.name], f"{config.__name__} options") for f in fields(config)]


def inner_config(config: type, name: str) -> type | None:
    """The dataclass that a field holds, if it holds one: its fields become options as well."""
    forms = get_args(get_type_hints(config)[name])
    return next((form for form in forms if isinstance(form, type) and is_dataclass(form)), None)


def with_fields(
    config: type, argument: str, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `argument` by one option per field of a dataclass.

    The command gets `argument` as an instance of `config`. `defaults` replaces the fields' own; a field whose name the
    command uses already is left out, and so are those `without` which it does.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        others = [p for name, p in signature.parameters.items() if name != argument]
        wanted = [f for f in fields(config) if f.name not in signature.parameters and f.name not in without]
        inner = {f.name: part for f in wanted if (part := inner_config(config, f.name)) is not None}
        options = [o for part in (config, *inner.values()) for o in options_of(part) if o.name not in inner]
        options = [o for o in options if o.name not in signature.parameters and o.name not in without]
        options = [o.replace(default=defaults.get(o.name, o.default)) for o in options]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {o.name: given.pop(o.name) for o in options}
            values = {name: pairs(name, v) if name in DICTS and v is not None else v for name, v in values.items()}
            for name, part in inner.items():
                own = {f.name: values.pop(f.name) for f in fields(part)}
                if any(own.values()):
                    values[name] = part(**own)
            command(**given, **{argument: config(**{k: v for k, v in values.items() if v is not None})})

        run.__signature__ = signature.replace(parameters=[*others, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*others, *options]}
        return run

    return decorate


def pairs(name: str, texts: list[str]) -> dict[int, float]:
    """TOKEN=NUMBER, one for each token. Raises RequestError, naming the option.

    >>> pairs("logit_bias", ["50=-1.5"])
    {50: -1.5}
    """
    found = {}
    for text in texts:
        token, _, number = text.partition("=")
        try:
            found[int(token)] = float(number)
        except ValueError:
            raise RequestError(f"{name} must be given as TOKEN=NUMBER, such as 50=-1.5, not {text!r}") from None
    return found
