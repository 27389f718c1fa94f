"""Chat templates: jinja in a sandbox, rendering what transformers renders and bounded in work and memory.

A template comes with a model's files and is trusted no more than they are. Only statements, filters and methods that
chat templates use are there. Whatever one of them makes is weighed, so that every value in reach stays below MAX_VALUE
and all of them together below MAX_TOTAL; the clock is looked at on the way. It knows neither tokens nor models.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minillm.errors import CheckpointError, RequestError

__all__ = ["ChatTemplate"]

MAX_SOURCE = 1 << 16
"""Characters of a template."""
MAX_TURNS = 200_000
"""Turns of loops and calls of macros in one rendering."""
MAX_SECONDS = 10.0
MAX_VALUE = 1 << 23
"""Bytes of a value, its entries counted as often as they occur; and characters of the text."""
MAX_TOTAL = 1 << 27
"""Bytes of all that one rendering makes."""
MAX_ARGUMENT = 1024
"""Characters that a filter or method may be given to search by: characters to strip, an attribute's path."""
MAX_INDENT = 64
MAX_BITS = 1024
ENTRY_BYTES = 100
"""What an entry takes at most beside what it holds: a dictionary's slot and a pair of items()."""
METER = "render meter"
"""Variable that no template can name, since it holds a blank; so do the names of the filters below."""
MADE, TICKED, TURN = "made value", "compared value", "loop turn"

FILTERS = (
    "capitalize count d default dictsort e escape first float indent int items join last length lower map max min "
    "reject rejectattr replace reverse safe select selectattr sort string title trim unique upper"
).split()
LAZY_FILTERS = ("map", "reject", "rejectattr", "select", "selectattr", "unique")
LONG_ARGUMENTS = (
    *("count", "d", "default", "endswith", "find", "format", "index", "join", "partition", "removeprefix"),
    *("removesuffix", "replace", "split", "startswith", ""),
)
"""Filters, methods and tests (unnamed) whose work does not multiply with the length of what they are given."""
TEXT_METHODS = (
    "capitalize count endswith find format index isalpha isdigit isspace join lower lstrip partition removeprefix "
    "removesuffix replace rstrip split splitlines startswith strip title upper"
).split()
METHODS: Mapping[type, Sequence[str]] = MappingProxyType(
    {str: TEXT_METHODS, dict: ("get", "items", "keys", "values"), list: ("count", "index"), tuple: ("count", "index")}
)
OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
REFUSED = (*OTHER_FILES, nodes.Block, nodes.FilterBlock, nodes.ScopedEvalContextModifier)
"""Statements that no chat template needs."""
WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)")
FORMAT_WIDTH = re.compile(r"\{[^}]*(\d{4}|\{)")


def weigh(value: Any) -> int:
    """Bytes of a value and of its entries, each as often as it occurs. Raises SecurityError above MAX_VALUE."""
    left, size = [value], 0
    while left:
        item = left.pop()
        size += sys.getsizeof(item)
        if isinstance(item, range):
            size += ENTRY_BYTES * len(item)
        if size > MAX_VALUE:
            raise SecurityError(f"a value of more than {MAX_VALUE} bytes")
        if isinstance(item, int) and item.bit_length() > MAX_BITS:
            raise SecurityError(f"a number of more than {MAX_BITS} bits")
        if isinstance(item, (list, tuple, dict)):
            left.extend(item)
        if isinstance(item, dict):
            left.extend(item.values())
    return size


class Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.num_turns = self.num_bytes = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self, value: Any = None) -> Any:
        """The value. Raises SecurityError when the time is over."""
        if time.monotonic() > self.deadline:
            raise SecurityError(f"more than {MAX_SECONDS:.0f} seconds")
        return value

    def turn(self) -> bool:
        """Count a turn of a loop; True, so that it can stand in a condition. Raises SecurityError at the limits."""
        self.num_turns += 1
        if self.num_turns > MAX_TURNS:
            raise SecurityError(f"more than {MAX_TURNS} loop turns")
        self.tick()
        return True

    def made(self, value: Any, *, is_new: bool = False) -> Any:
        """Count a value that was made and return it; `is_new`: with its entries, not of entries that were there."""
        self.tick()
        size = weigh(value)
        if isinstance(value, (list, tuple, dict)) and not is_new:
            size = min(size, ENTRY_BYTES * (1 + len(value)))
        self.num_bytes += size
        if self.num_bytes > MAX_TOTAL:
            raise SecurityError(f"more than {MAX_TOTAL} bytes of values in all")
        return value

    def listed(self, entries: Iterable[Any]) -> list[Any]:
        """The entries as a list. Raises SecurityError if there are too many."""
        found = []
        for entry in map(self.tick, entries):
            found.append(entry)
            if len(found) * ENTRY_BYTES > MAX_VALUE:
                raise SecurityError(f"more than {len(found) - 1} entries")
        return found


def meter_of(context: Context) -> Meter:
    """The meter of a rendering."""
    meter: Meter = context.parent[METER]
    return meter


class GenerationTag(Extension):
    """{% generation %} … {% endgeneration %}: marks a reply for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own name)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class PlainNamespace(Namespace):
    """namespace(): variables that loops can change. As text it is a word, since they can grow after it was weighed."""

    def __repr__(self) -> str:
        return "namespace"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a meter on operators, filters, tests, methods and output, and nothing computed before."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=to_text, optimized=False)
        self.add_extension(loopcontrols)
        self.add_extension(GenerationTag)
        own = {name: self.filters[name] for name in FILTERS} | {"list": iter, "tojson": to_json}
        self.filters = {name: metered(name, call) for name, call in own.items()} | {
            MADE: jinja2.pass_context(lambda context, value: meter_of(context).made(value)),
            TICKED: jinja2.pass_context(lambda context, value: meter_of(context).tick(value)),
            TURN: jinja2.pass_context(lambda context, value: meter_of(context).turn()),
        }
        self.tests = {n: metered("", call) for n, call in self.tests.items() if not hasattr(call, "jinja_pass_arg")}
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": PlainNamespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods that are known, and what loops, macros and namespaces show."""
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, (LoopContext, Macro, Namespace)) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic whose result stays small."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                is_repeated = isinstance(value, (str, list, tuple)) and isinstance(times, int)
                if is_repeated and weigh(value) * times > MAX_VALUE:
                    raise SecurityError(f"a repetition of more than {MAX_VALUE} bytes")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_BITS:
                raise SecurityError("a power of large numbers")
        elif operator == "%" and isinstance(left, str) and (isinstance(right, dict) or WIDTH.search(left)):
            raise SecurityError("a format with names or a large width")
        return meter_of(context).made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **values: Any) -> Any:
        """Call a method or macro."""
        meter = meter_of(context)
        weigh((*args, *values.values()))
        method = getattr(obj, "__wrapped__", obj)  # jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name == "join":
                args = tuple(meter.listed(arg) if isinstance(arg, str) else arg for arg in args)
            check_growth(name, (owner, *args), values)
        value = super().call(context, obj, *args, **values)
        listed = list(value) if isinstance(value, (KeysView, ItemsView, ValuesView)) else value
        return meter.made(listed, is_new=isinstance(owner, str))


def metered(name: str, call: Any) -> Callable[..., Any]:
    """A filter or test that is counted, refuses what would grow beyond bounds, and gives lists, not iterators."""
    mark = getattr(call, "jinja_pass_arg", None)  # which object of jinja's it takes first

    @jinja2.pass_context
    def counted(context: Context, subject: Any, *args: Any, **values: Any) -> Any:
        meter = meter_of(context)
        is_text = isinstance(subject, str)
        if is_text and name in ("join", "sort"):
            subject = meter.listed(subject)
        check_growth(name, (subject, *args), values)
        if name in LAZY_FILTERS and subject:
            subject = map(meter.tick, subject)
        parts = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        first = () if mark is None else (parts[mark.name],)
        value = call(*first, subject, *args, **values)
        return meter.made(meter.listed(value) if isinstance(value, Iterator) else value, is_new=is_text)

    return counted


def check_growth(name: str, args: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Raise SecurityError if a filter or method of args[0] would make much of little, or take long."""
    subject, others = args[0], (*args[1:], *values.values())
    if name not in LONG_ARGUMENTS and any(isinstance(v, str) and len(v) > MAX_ARGUMENT for v in others):
        raise SecurityError(f"{name} given a text of more than {MAX_ARGUMENT} characters")
    size = 0
    if name == "replace":
        if len(args) < 3:
            raise SecurityError("replace without its two texts in order")
        text, old, new = (str(value) for value in args[:3])
        size = text.count(old) * len(new)
    elif name == "join":
        size = len(subject) * max((len(v) for v in others if hasattr(v, "__len__")), default=0)
    elif name == "indent":
        widths = [len(v) if isinstance(v, str) else v for v in others if isinstance(v, (int, str))]
        size = (1 + len(str(subject).splitlines())) * max(widths, default=4)
    elif name == "format":
        if FORMAT_WIDTH.search(subject.replace("{{", "")):
            raise SecurityError("a format with a large width")
        size = subject.count("{") * weigh(others)
    if size > MAX_VALUE:
        raise SecurityError(f"{name} would make more than {MAX_VALUE} characters")


def raise_exception(message: str) -> None:
    """What templates call to refuse messages."""
    raise jinja2.TemplateError(message)


def strftime_now(layout: str) -> str:
    """The time of day as text."""
    if len(layout) > MAX_ARGUMENT or WIDTH.search(layout):
        raise SecurityError("a layout of the time that is long or has a large width")
    return datetime.now().strftime(layout)


@jinja2.pass_context
def to_text(context: Context, value: Any) -> str:
    """What is written of a value; all that a template writes passes here."""
    return str(meter_of(context).made(str(value)))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes."""
    widths = [len(v) if isinstance(v, str) else v for v in (indent or 0, *(separators or ()))]
    if max(widths) > MAX_INDENT:
        raise SecurityError(f"JSON with more than {MAX_INDENT} characters of indent")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, size = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_VALUE:
            raise SecurityError(f"JSON of more than {MAX_VALUE} characters")
    return "".join(pieces)


class Metering(NodeTransformer):
    """Puts the meter into a template: in each turn of a loop, on what literals, slices, `~` and blocks make, on what is
    compared, and on constant text, which is written like any value."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Refuse statements that are not known; handle entries before what holds them."""
        if isinstance(node, REFUSED) or (isinstance(node, nodes.AssignBlock) and node.filter is not None):
            raise SecurityError(f"line {node.lineno} has a statement that is not supported in chat templates")
        node = self.generic_visit(node)
        if isinstance(node, nodes.TemplateData):
            return nodes.Const(node.data)
        if isinstance(node, nodes.AssignBlock):
            node.filter = through("string", None)
        elif isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(through(TURN, nodes.Const(None))))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(through(TURN, nodes.Const(None)), node.test)
        elif isinstance(node, nodes.Operand):
            node.expr = through(TICKED, node.expr)
        elif isinstance(node, nodes.Concat):
            node.nodes = [through("string", part) for part in node.nodes]
            return through(MADE, node)
        elif (isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)) and getattr(node, "ctx", "load") == "load") or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            return through(MADE, node)
        return node


def through(name: str, value: nodes.Expr | None) -> nodes.Filter:
    """`value | name`."""
    return nodes.Filter(value, name, [], [], None, None)


class ChatTemplate:
    """A compiled chat template. `render` may be called from several threads."""

    def __init__(self, source: str, named: Mapping[str, str]) -> None:
        """`named`: bos_token, eos_token … for the template to write. Raises CheckpointError if it does not compile."""
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
        self._named = dict(named)
        environment = TemplateEnvironment()
        try:
            tree = Metering().visit(environment.parse(source))
            tree.set_environment(environment)
            for node in tree.find_all(nodes.Node):
                node.lineno = node.lineno or 1
            code = environment.compile(tree)
        except Exception as error:  # jinja's errors, and those of Python's compiler for what jinja makes of a template
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
        meter, pieces, size = Meter(), [], 0
        try:
            variables = {
                **self._named,
                "messages": meter.made(plain(messages)),
                "tools": None if tools is None else meter.made(plain(tools)),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                METER: meter,
            }
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > MAX_VALUE:
                    raise SecurityError(f"a text of more than {MAX_VALUE} characters")
                pieces.append(piece)
        except RequestError:
            raise
        except RecursionError as error:
            raise RequestError("the chat template calls itself too often, or messages are nested too deeply") from error
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
