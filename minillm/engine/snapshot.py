"""A scheduler's whole state as plain values and back, without what its requests say. Nothing in a file is run.

`freeze` must be quick, the engine waits for it: it copies arrays and tables and leaves the rest to `encode`.
Tokens become zeros, keys of blocks become numbers, and sampling parameters, drafts and salts are left out: none of them
changes a schedule once the keys are known.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

from minillm.core.block_pool import BlockPool
from minillm.core.budget import SchedulerLimits
from minillm.core.kv_manager import KVManager
from minillm.core.queue import RequestQueue
from minillm.core.request import Request
from minillm.core.running import Running
from minillm.core.scheduler import Scheduler
from minillm.errors import ConfigError
from minillm.types import FinishReason

__all__ = ["STOP_TOKEN", "First", "Keys", "decode", "encode", "freeze", "texts"]

CLASSES: dict[str, type] = {
    cls.__name__: cls for cls in (BlockPool, KVManager, Request, RequestQueue, Running, Scheduler, SchedulerLimits)
}
LEAVES = (type(None), bool, int, float, str, bytes)
CONTENTS = ("tokens", "params", "stop_token_ids", "salt", "drafts")
"""Fields of a request that hold what it says or how it is sampled."""
REQUEST_FIELDS = tuple(name for name in Request.__slots__ if name not in CONTENTS)
read_fields = attrgetter(*REQUEST_FIELDS)
STOP_TOKEN = 1
"""Stands for any token that ends its request; other tokens are 0."""
MAX_TOKENS = 2**24


class Frozen(NamedTuple):
    """An object: its class, a number by which others refer to it, its fields."""

    name: str
    number: int
    fields: dict[str, Any]


class Same(NamedTuple):
    """A reference to an object that came before."""

    number: int


class First(NamedTuple):
    """The first values of a list that only grows: as good as a copy."""

    values: list[bytes]
    num: int


class Zeros(NamedTuple):
    """So many tokens."""

    num: int


def freeze(value: Any, seen: dict[int, int] | None = None, leave_out: str = "") -> Any:
    """`value` as it is now. `seen`: numbers of objects by id, shared within one snapshot.

    What is neither a container nor of the scheduler's classes becomes None, and so does the attribute `leave_out`.
    """
    seen = {} if seen is None else seen
    if isinstance(value, array):
        return value[:]
    if isinstance(value, LEAVES):
        return value
    if isinstance(value, dict | list | deque | tuple | frozenset):
        return freeze_container(value, seen)
    if id(value) in seen:
        return Same(seen[id(value)])
    if isinstance(value, Request):
        number = seen[id(value)] = len(seen)
        return Frozen("Request", number, freeze_request(value, seen))
    name = next((cls.__name__ for cls in type(value).__mro__ if cls.__name__ in CLASSES), None)
    if name is None:
        return None
    number = seen[id(value)] = len(seen)
    names = vars(value) if hasattr(value, "__dict__") else type(value).__slots__
    return Frozen(name, number, {f: freeze(getattr(value, f), seen) for f in names if f != leave_out})


def freeze_request(request: Request, seen: dict[int, int]) -> dict[str, Any]:
    """Its fields; there may be a thousand, so those that nobody changes in place are not looked at one by one."""
    fields = dict(zip(REQUEST_FIELDS, read_fields(request), strict=True))
    parent = None if request.parent is None else freeze(request.parent, seen)
    return fields | {
        "blocks": request.blocks[:],
        "keys": First(request.keys, len(request.keys)),
        "parent": parent,
        "tokens": Zeros(len(request.tokens)),
    }


def freeze_container(value: Any, seen: dict[int, int]) -> Any:
    """A copy; of the elements too, unless they are plain, as the tables of blocks are."""
    if isinstance(value, dict):
        if all(isinstance(v, LEAVES) for v in islice(value.values(), 1)):
            return value.copy()
        return {key: freeze(v, seen) for key, v in value.items()}
    if all(isinstance(v, LEAVES) for v in islice(value, 1)):
        return value[:] if isinstance(value, list) else value.copy() if isinstance(value, deque) else value
    return type(value)(freeze(v, seen) for v in value)


class Keys:
    """Numbers in place of the keys of blocks: equal for equal keys, and nothing can be guessed from them."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def number(self, key: bytes) -> int:
        """The number of a key."""
        return self._numbers.setdefault(key, len(self._numbers))


def encode(value: Any, keys: Keys) -> Any:
    """What `freeze` gave, as values that JSON has; whatever is not plain becomes a list that begins with its kind."""
    if isinstance(value, bytes):
        return ["key", keys.number(value)]
    if isinstance(value, FinishReason):
        return ["reason", value.value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return ["infinity", value > 0]
    if isinstance(value, LEAVES):
        return value
    if isinstance(value, Frozen):
        return ["object", value.name, value.number, {f: encode(v, keys) for f, v in value.fields.items()}]
    if isinstance(value, Same):
        return ["same", value.number]
    if isinstance(value, Zeros):
        return ["zeros", value.num]
    if isinstance(value, First):
        return ["list", *(encode(v, keys) for v in value.values[: value.num])]
    if isinstance(value, array):
        return ["ints", *value]
    if isinstance(value, dict):
        kind = "ordered" if isinstance(value, OrderedDict) else "dict"
        return [kind, *([encode(k, keys), encode(v, keys)] for k, v in value.items())]
    kinds: dict[type, str] = {list: "list", deque: "deque", tuple: "tuple", frozenset: "set"}
    return [kinds[type(value)], *(encode(v, keys) for v in value)]


def texts(value: Any, keys: Keys) -> Iterator[str]:
    """What `encode` gives as JSON text, in small pieces: a state of thousands of requests takes a while."""
    if isinstance(value, Frozen) and value.name != "Request":
        yield f'["object", {json.dumps(value.name)}, {value.number}, {{'
        for i, (name, field) in enumerate(value.fields.items()):
            yield f"{', ' if i else ''}{json.dumps(name)}: "
            yield from texts(field, keys)
        yield "}]"
    elif isinstance(value, dict):
        yield '["ordered"' if isinstance(value, OrderedDict) else '["dict"'
        for key, item in value.items():
            yield f", [{json.dumps(encode(key, keys))}, "
            yield from texts(item, keys)
            yield "]"
        yield "]"
    else:
        yield json.dumps(encode(value, keys))


def key_of(number: int) -> bytes:
    """A key that is like no other number's."""
    return b"%d" % number


def decode(value: Any, objects: dict[int, Any], classes: dict[str, type]) -> Any:
    """What `encode` gave, as it was; objects are added to `objects`. `classes`: of what class to make them.

    Raises ConfigError for a value that `encode` does not make.
    """
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind == "object":
        return decode_object(parts, objects, classes)
    if kind == "same":
        return objects[parts[0]]
    if kind in ("dict", "ordered"):
        made: dict[Any, Any] = OrderedDict() if kind == "ordered" else {}
        made.update((decode(k, objects, classes), decode(v, objects, classes)) for k, v in parts)
        return made
    if kind in ("list", "deque", "tuple", "set"):
        container = {"list": list, "deque": deque, "tuple": tuple, "set": frozenset}[kind]
        return container(decode(part, objects, classes) for part in parts)
    if kind == "ints":
        return array("i", parts)
    if kind == "key":
        return key_of(parts[0])
    if kind == "reason":
        return FinishReason(parts[0])
    if kind == "infinity":
        return float("inf") if parts[0] else float("-inf")
    if kind == "zeros" and 0 <= parts[0] <= MAX_TOKENS:
        return array("i", [0]) * parts[0]
    raise ConfigError(f"a recording holds {str(kind)[:40]!r}, which MiniLLM does not write")


def decode_object(parts: list[Any], objects: dict[int, Any], classes: dict[str, type]) -> Any:
    """An object with its fields set, none of its code run."""
    name, number, fields = parts
    if name not in CLASSES:
        raise ConfigError(f"a recording holds an object of class {str(name)[:40]!r}, which MiniLLM does not write")
    thawed: Any = object.__new__(classes.get(name, CLASSES[name]))
    objects[number] = thawed
    for field, value in fields.items():
        object.__setattr__(thawed, field, decode(value, objects, classes))
    if isinstance(thawed, Request):
        thawed.salt, thawed.drafts, thawed.stop_token_ids = b"", [], frozenset({STOP_TOKEN})
        thawed.params = None  # type: ignore[assignment]
    return thawed
