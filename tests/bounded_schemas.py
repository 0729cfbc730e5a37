"""Twenty JSON schemas whose texts are all short, so that even a random model comes to an end under them."""

from typing import Any


def thing(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object with these properties and no others, all of them required."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False} | more


WORD = {"type": "string", "maxLength": 8}
SMALL = {"type": "integer", "minimum": 0, "maximum": 100}
QUARTERS = {"type": "number", "minimum": -10, "maximum": 10, "multipleOf": 0.25}
ZIP = {"type": "string", "pattern": "^[0-9]{5}$"}
COLOUR = {"enum": ["red", "green", "blue"]}


def listing(items: dict[str, Any], most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


# The first five are of every kind: the fast tests take these.
BOUNDED: dict[str, dict[str, Any]] = {
    "strings": thing({"name": WORD, "note": {"type": "string", "minLength": 2, "maxLength": 12}}),
    "numbers": thing({"count": SMALL, "price": QUARTERS, "below": {"type": "integer", "minimum": -5, "maximum": -1}}),
    "nested": thing({"who": thing({"name": WORD, "home": thing({"zip": ZIP})})}),
    "arrays": thing({"tags": listing(WORD, 3), "pairs": listing(listing(SMALL, 2, 2), 2, 1)}),
    "refs": {
        "$defs": {"point": thing({"x": SMALL, "y": SMALL}), "colour": COLOUR},
        **thing({"at": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}, "ink": {"$ref": "#/$defs/colour"}}),
    },
    "enums": thing({"colour": COLOUR, "level": {"enum": [1, 2, 3]}, "mixed": {"enum": ["a", 1, None, True, [1, 2]]}}),
    "const": thing({"version": {"const": "1.0"}, "word": WORD}),
    "booleans": thing({"yes": {"type": "boolean"}, "nothing": {"type": "null"}}),
    "optional": thing({"must": SMALL, "may": WORD, "might": COLOUR}, required=["must"]),
    "any of": thing({"value": {"anyOf": [WORD, SMALL, {"type": "null"}]}}),
    "types": thing({"value": {"type": ["string", "null", "boolean"], "maxLength": 5}}),
    "list at the top": listing(thing({"id": SMALL}), 3, 1),
    "string at the top": {"type": "string", "maxLength": 10},
    "enum at the top": {"enum": ["spring", "summer", "autumn", "winter"]},
    "number at the top": {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 20},
    "tuple": {
        "type": "array",
        "prefixItems": [WORD, SMALL, COLOUR],
        "items": False,
        "minItems": 3,
    },
    "patterns": thing(
        {
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "day": {"type": "string", "format": "date"},
            "address": {"type": "string", "format": "ipv4"},
        }
    ),
    "bounded tree": {
        "$defs": {
            "leaf": thing({"value": SMALL}),
            "twig": thing({"leaves": listing({"$ref": "#/$defs/leaf"}, 2)}),
        },
        **thing({"twigs": listing({"$ref": "#/$defs/twig"}, 2)}),
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": SMALL}, "required": ["a"]},
            {"type": "object", "properties": {"b": WORD}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    "odd words": thing({'a "quoted" \\ name': WORD, "größe": SMALL, "": {"type": "boolean"}}),
}
