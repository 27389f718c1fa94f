"""What users may give: numbers in ranges, lists of tokens and strings. Each check names the field and its range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import SupportsFloat, SupportsIndex

from minillm.errors import RequestError

MAX_BIASED_TOKENS = 300
MAX_INT = 2**31 - 1
MAX_SHOWN = 80


def check_end_tokens(stop_token_ids: object, ignore_eos: object) -> None:
    """Raise RequestError unless these are a list of token ids and a bool."""
    if not isinstance(ignore_eos, bool):
        raise RequestError(f"ignore_eos must be True or False, not {shown(ignore_eos)}")
    check_tokens("stop_token_ids", stop_token_ids)


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise RequestError unless `value` is an integer in [low, high]."""
    number = as_int(value)
    if number is None or not low <= number <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, not {shown(value)}")


def keep_plain(params: object, names: Sequence[str]) -> None:
    """Make Python's own of numbers, checked or None, in a frozen `params`: numpy's overflow in sums."""
    for name in names:
        value = getattr(params, name)
        if value is not None and type(value) not in (int, float):
            plain = as_int(value)
            object.__setattr__(params, name, as_float(value) if plain is None else plain)


def check_priority(priority: object) -> None:
    """Raise RequestError unless this is an integer: what is served first is found by comparing."""
    check_int("priority", priority, -MAX_INT, MAX_INT)


def check_float(name: str, value: object, low: float, high: float, low_open: bool = False) -> None:
    """Raise RequestError unless `value` is a finite number in [low, high], or in (low, high] if `low_open`."""
    number = as_float(value)
    if not low <= number <= high or (low_open and number == low):  # true for NaN
        raise RequestError(f"{name} must be a number in {'(' if low_open else '['}{low}, {high}], not {shown(value)}")


def check_strings(name: str, value: object, max_num: int) -> None:
    """Raise RequestError unless `value` is a list of at most `max_num` strings, none of them empty."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) and part for part in value):
        raise RequestError(f"{name} must be a list of non-empty strings, not {shown(value)}")
    if len(value) > max_num:
        raise RequestError(f"{name} takes at most {max_num} strings, not {len(value)}")
    for part in value:
        check_unicode(name, part)


def check_unicode(name: str, text: str) -> None:
    """Raise RequestError if a text has half a character, as JSON can: no text that is generated holds one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} is no Unicode text ({error.reason}); remove lone surrogates") from error


def check_tokens(name: str, value: object) -> None:
    """Raise RequestError unless `value` is a list of token ids; the engine knows the largest."""
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{name} must be a list of integers, not {shown(value)}")
    if (
        set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= MAX_INT
    ):  # ten times as fast as what follows
        return
    for token in value:
        check_int(name, token, 0, MAX_INT)


def check_biases(value: object) -> None:
    """Raise RequestError unless `value` maps token ids to numbers in [-100, 100]."""
    if not isinstance(value, dict):
        raise RequestError(f"logit_bias must be a dict of token ids and numbers, not {shown(value)}")
    if len(value) > MAX_BIASED_TOKENS:
        raise RequestError(f"logit_bias takes at most {MAX_BIASED_TOKENS} tokens, not {len(value)}")
    check_tokens("logit_bias", list(value))
    for bias in value.values():
        check_float("logit_bias", bias, -100.0, 100.0)


def as_int(value: object) -> int | None:
    """An integer, numpy's too, as an int; None for anything else, a bool as well."""
    if type(value) is int:
        return value
    try:
        return index(value) if isinstance(value, SupportsIndex) and not isinstance(value, bool) else None
    except TypeError:  # an array that is no number
        return None


def as_float(value: object) -> float:
    """A number, numpy's too, as a float; NaN for anything else, a bool as well."""
    if type(value) is float:
        return value
    try:
        return float(value) if isinstance(value, SupportsFloat) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several
        return math.nan


def shown(value: object) -> str:
    """A value as an error message shows it: short, whatever it is.

    >>> shown(10**5000)
    'a number of too many digits'
    """
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of too many digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
