"""Ten JSON schemas of bounded texts, from a flat object to nested lists, for structured output."""

from __future__ import annotations

from typing import Any


def closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


WORD = {"type": "string", "pattern": "^[A-Za-z ]{1,12}$"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 99}

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": closed({"name": WORD, "age": COUNT}),
    "flags": closed({"is_open": {"type": "boolean"}, "is_new": {"type": "boolean"}, "owner": {"type": "null"}}),
    "colour": closed({"colour": {"enum": ["red", "green", "blue"]}, "shade": {"const": "dark"}}),
    "point": closed({axis: {"type": "integer", "minimum": -9, "maximum": 9} for axis in "xyz"}),
    "tags": closed({"tags": {"type": "array", "items": WORD, "minItems": 1, "maxItems": 3}}),
    "date": closed({"date": {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])$"}}),
    "nested": closed({"user": closed({"name": WORD, "home": closed({"city": WORD})})}),
    "people": {"type": "array", "items": closed({"name": WORD, "age": COUNT}), "minItems": 1, "maxItems": 2},
    "choice": {"anyOf": [closed({"error": WORD}), closed({"total": COUNT})]},
    "shared": closed(
        {"from": {"$ref": "#/$defs/place"}, "to": {"$ref": "#/$defs/place"}},
        **{"$defs": {"place": closed({"city": WORD})}},
    ),
}
