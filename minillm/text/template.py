"""Chat templates: jinja in a sandbox, rendering what transformers renders and bounded in work and memory.

A template comes with a model's files and is trusted no more than they are: it sees plain JSON values, reaches no Python
object behind them, and ends after a number of loop turns and seconds. It knows neither tokens nor models.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minillm.errors import CheckpointError, RequestError

__all__ = ["ChatTemplate"]

MAX_SOURCE = 1 << 18
"""Characters of a template."""
MAX_TURNS = 200_000
"""Turns of loops and calls of macros in one rendering."""
MAX_SECONDS = 10.0
MAX_VALUE = 1 << 24
"""Characters or entries of a value that the template computes."""
MAX_ENTRIES = 1 << 20
"""Entries of a list and of all lists in it, when it becomes text."""
MAX_NUMBER = 1 << 16
"""Largest whole number given to a filter or method: no padding or repetition beyond it."""
MAX_BITS = 64
METER = "render meter"
"""Variable that no template can name, since it holds a blank."""
FILTERS = (
    "abs batch capitalize count d default dictsort e escape first float groupby indent int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string sum title trim "
    "truncate unique upper urlencode wordcount"
).split()
GROWING_METHODS = ("center", "expandtabs", "ljust", "rjust", "translate", "zfill")
SHALLOW_FILTERS = ("count", "first", "last", "length")
"""Filters that look at no more than one entry of a list."""
WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)")


class Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.num_turns = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def turn(self) -> bool:
        """Count one turn; True, so that it can stand in a condition. Raises SecurityError at the limits."""
        self.num_turns += 1
        if self.num_turns > MAX_TURNS:
            raise SecurityError(f"more than {MAX_TURNS} loop turns")
        if self.num_turns % 256 == 0 and time.monotonic() > self.deadline:
            raise SecurityError(f"more than {MAX_SECONDS:.0f} seconds")
        return True


class GenerationTag(Extension):
    """{% generation %} … {% endgeneration %}: marks a reply for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own name)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class PlainNamespace(Namespace):
    """namespace(): variables that loops can change, none of them hidden."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        for name in dict(*args, **values):
            check_public(name)

    def __setitem__(self, name: str, value: Any) -> None:
        check_public(name)
        super().__setitem__(name, value)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with limits on what operators, filters and methods may make."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag], finalize=check_depth
        )
        own = {name: self.filters[name] for name in FILTERS} | {"tojson": to_json}
        self.filters = {name: limited(name, call) for name, call in own.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": PlainNamespace,
            "raise_exception": raise_exception,
            "strftime_now": lambda layout: datetime.now().strftime(layout),
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
        }

    @staticmethod
    @jinja2.pass_context
    def take_turn(context: Context) -> bool:
        """Called in every turn of every loop."""
        meter: Meter = context.parent[METER]
        return meter.turn()

    @staticmethod
    def check_depth(value: Any) -> Any:
        """`check_depth`, for templates' code to call."""
        return check_depth(value)

    @staticmethod
    def check_size(value: Any) -> Any:
        """The value, unless it has grown too large."""
        if isinstance(value, (str, list, tuple, dict)) and len(value) > MAX_VALUE:
            raise SecurityError(f"a value of more than {MAX_VALUE} characters or entries")
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuse methods of strings that grow them at will, beside what jinja refuses."""
        if isinstance(obj, str) and attr in GROWING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse str.format, whose widths grow texts at will."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("the method format")
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic whose result stays small."""
        if operator == "*":
            check_product(left, right)
        elif operator == "**" and not (abs(left) < 1 << MAX_BITS and abs(right) <= MAX_BITS):
            raise SecurityError("a power of large numbers")
        elif operator == "%" and isinstance(left, str):
            check_depth(right)
            if WIDTH.search(left):
                raise SecurityError("a format with a large width")
        return self.check_size(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, *args: Any, **values: Any) -> Any:  # noqa: N804 (jinja's own signature)
        """Call a method or macro; what it makes stays bounded."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            check_growth(name, (owner, *args))
            check_numbers((*args, *values.values()))
        return self.check_size(super().call(context, obj, *args, **values))


def limited(name: str, filter_call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses arguments that would grow its result beyond bounds."""

    @wraps(filter_call)  # keeps jinja's marks: which filters take the environment or context first
    def call(*args: Any, **values: Any) -> Any:
        plain = args[1:] if hasattr(filter_call, "jinja_pass_arg") else args
        if name not in SHALLOW_FILTERS:
            check_depth(plain)
        check_growth(name, (*plain, *values.values()))
        check_numbers((*plain[1:], *values.values()))
        return TemplateEnvironment.check_size(filter_call(*args, **values))

    return call


def check_depth(value: Any) -> Any:
    """The value, unless its text would be large because lists hold each other many times. Raises SecurityError."""
    left, num_entries = [value], 0
    while left:
        item = left.pop()
        if isinstance(item, (list, tuple, dict)):
            num_entries += len(item)
            if num_entries > MAX_ENTRIES:
                raise SecurityError(f"a list of more than {MAX_ENTRIES} entries in all")
            left.extend(item.values() if isinstance(item, dict) else item)
    return value


def check_numbers(values: Sequence[Any]) -> None:
    """Raise SecurityError for a large whole number."""
    if any(isinstance(value, int) and abs(value) > MAX_NUMBER for value in values):
        raise SecurityError(f"a number above {MAX_NUMBER} given to a filter or method")


def check_growth(name: str, values: Sequence[Any]) -> None:
    """Raise SecurityError if `replace` or `join` of these values would make a large text."""
    size = 0
    if name == "replace" and len(values) >= 3:
        text, old, new = (str(value) for value in values[:3])
        size = len(text) + text.count(old) * len(new)
    elif name == "indent" and values:
        text = str(values[0])
        size = len(text) + (text.count("\n") + 1) * max((v for v in values[1:] if isinstance(v, int)), default=4)
        size += sum(text.count("\n") * len(v) for v in values[1:] if isinstance(v, str))
    elif name == "join" and len(values) >= 2:
        parts = next((v for v in values if isinstance(v, (list, tuple))), ())
        size = len(parts) * max((len(v) for v in values if isinstance(v, str)), default=0)
        size += sum(len(part) for part in parts if isinstance(part, str))
    if size > MAX_VALUE:
        raise SecurityError(f"{name} would make more than {MAX_VALUE} characters")


def check_product(left: Any, right: Any) -> None:
    """Raise SecurityError if left * right would be large."""
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int) and len(value) * times > MAX_VALUE:
            raise SecurityError(f"a repetition of more than {MAX_VALUE} characters or entries")
        if isinstance(value, int) and abs(value) >= 1 << MAX_BITS:
            raise SecurityError("a product of large numbers")


def check_public(name: object) -> None:
    """Raise SecurityError for a name that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the variable {name!r}")


def raise_exception(message: str) -> None:
    """What templates call to refuse messages."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def metered(environment: jinja2.Environment, tree: nodes.Template) -> nodes.Template:
    """The template with a turn counted in each loop and macro, and the size of each `~` checked."""

    def call(name: str, *args: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)

    loop: nodes.For | nodes.Macro | nodes.CallBlock
    for loop in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):  # type: ignore[assignment]
        loop.body.insert(0, nodes.ExprStmt(call("take_turn")))
        if isinstance(loop, nodes.For) and loop.test is not None:
            loop.test = nodes.And(call("take_turn"), loop.test)
    for concat in list(tree.find_all(nodes.Concat)):
        parts = [call("check_depth", part) for part in concat.nodes]
        concat.nodes = [call("check_size", nodes.Concat(parts))]
    tree.set_environment(environment)
    for node in tree.find_all(nodes.Node):
        node.lineno = node.lineno or 1
    return tree


class ChatTemplate:
    """A compiled chat template. `render` may be called from several threads."""

    def __init__(self, source: str, named: Mapping[str, str]) -> None:
        """`named`: bos_token, eos_token … for the template to write. Raises CheckpointError if it does not compile."""
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
        self._named = dict(named)
        environment = TemplateEnvironment()
        try:
            code = environment.compile(metered(environment, environment.parse(source)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template cannot be compiled: {error}") from error
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation. Raises RequestError if the template refuses it or exceeds its limits."""
        if not messages:
            raise RequestError("messages must hold at least one message")
        variables = {
            **self._named,
            "messages": plain(messages),
            "tools": None if tools is None else plain(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            METER: Meter(),
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > MAX_VALUE:
                    raise SecurityError(f"a text of more than {MAX_VALUE} characters")
                pieces.append(piece)
        except RecursionError as error:
            raise RequestError("the chat template calls itself too often") from error
        except Exception as error:  # a template can raise anything that Python's operators raise
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return "".join(pieces)


def plain(value: Any) -> Any:
    """A copy made of plain JSON values alone, so that a template meets no other methods. Raises RequestError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value if type(value) in (type(None), bool, int, float, str) else json.loads(json.dumps(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item) for item in value]
    raise RequestError(f"messages hold a value of type {type(value).__name__}; use text, numbers, lists and objects")
