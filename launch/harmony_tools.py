"""The tools section of a system or developer message: JSON schema -> the TypeScript that gpt-oss was trained on.

It knows neither tokens nor messages. The layout, the odd corners included, is that of openai-harmony 0.0.8
(https://github.com/openai/harmony, `json_schema_to_typescript` and `template_tools_section` in
src/encoding.rs): the model has seen exactly these characters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FunctionTool:
    """A function that the model may call as `functions.{name}`.

    parameters: JSON schema of the arguments; None for a function without any.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


def tools_section(namespace: str, description: str, tools: Sequence[FunctionTool]) -> str:
    """The text under `## {namespace}`: the description, then one TypeScript type a tool."""
    comment = "// " if tools else ""  # a namespace without functions (python) is described in plain text
    lines = [f"## {namespace}\n", *(comment + line for line in _lines(description))]
    if tools:
        lines.append(f"namespace {namespace} {{\n")
        for tool in tools:
            lines += ["// " + line for line in _lines(tool.description)]
            argument = "" if tool.parameters is None else f"_: {typescript(tool.parameters)}"
            lines.append(f"type {tool.name} = ({argument}) => any;\n")
        lines.append(f"}} // namespace {namespace}")
    return "\n".join(lines)


def typescript(schema: Any, indent: str = "") -> str:
    """A JSON schema as a TypeScript type; what it cannot say (anyOf, $ref, a non-schema) is `any`."""
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_top_variant(variant, indent)}" for variant in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        if names:
            return " | ".join(names)
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string":
        values = schema.get("enum")
        values = [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
        return " | ".join(f'"{value}"' for value in values) or "string"
    return _SCALARS.get(kind, "any") if isinstance(kind, str) else "any"


_SCALARS = {"number": "number", "integer": "number", "boolean": "boolean"}


def _object(schema: Mapping, indent: str) -> str:
    lines = [f"{indent}// {note}\n" for note in _texts(schema, "description")] + ["{\n"]
    properties, required = schema.get("properties"), schema.get("required")
    required = required if isinstance(required, list) else []
    for name, value in properties.items() if isinstance(properties, Mapping) else ():
        lines += _property(name, value if isinstance(value, Mapping) else {}, name not in required, indent)
    return "".join(lines) + f"{indent}}}"


def _property(name: str, schema: Mapping, optional: bool, indent: str) -> list[str]:
    """Lines of one property: comments above, then `name?: type, // default`."""
    lines = [f"{indent}// {title}\n{indent}//\n" for title in _texts(schema, "title")]
    described = _texts(schema, "description")
    label = f"{indent}{name}{'?' if optional else ''}:"
    variants = schema.get("oneOf")

    if "oneOf" not in schema:
        lines += [f"{indent}// {note}\n" for note in described]
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        lines.append(f"{indent}// Examples:\n")
        lines += [f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str)]

    if isinstance(variants, list):
        if variants and _texts(variants[0], "description") == described:
            above: list[str] = []  # the first variant says the same
        else:
            above = described
        lines += [f"{indent}// {note}\n" for note in above]
        lines += [f"{indent}// {note}\n" for note in _default(schema)]
        lines.append(f"{label}\n")
        for place, variant in enumerate(variants):
            notes = [note for note in _texts(variant, "description") if [note] != described]
            if place == 0 and above:
                notes = []
            lines.append(_with_notes(f"{indent} | {_nullable(variant, indent + '   ')}", notes + _default(variant)))
            lines.append("\n")
        return [*lines, f"{indent},\n"]

    default = [] if "oneOf" in schema else _default(schema)
    return [*lines, _with_notes(f"{label} {_nullable(schema, indent + '    ')},", default), "\n"]


def _top_variant(schema: Any, indent: str) -> str:
    """One variant of a oneOf that is not a property's; here the default of an enum keeps its quotes."""
    return _with_notes(
        _nullable(schema, indent + "   "), _texts(schema, "description") + _default(schema, bare_enum=False)
    )


def _nullable(schema: Any, indent: str) -> str:
    """The type, with ` | null` if OpenAPI's `nullable` is set and the text does not say null already."""
    text = typescript(schema, indent)
    nullable = isinstance(schema, Mapping) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _default(schema: Any, bare_enum: bool = True) -> list[str]:
    """`default: VALUE`, or nothing. A string is quoted, but not escaped; that of an enum stands bare."""
    if not isinstance(schema, Mapping) or "default" not in schema:
        return []
    value, values = schema["default"], schema.get("enum")
    if not isinstance(value, str):
        return [f"default: {_json(value)}"]
    if not (isinstance(values, list) and values):
        return [f'default: "{value}"']
    return [f"default: {value if bare_enum else _json(value)}"]


def _texts(schema: Any, key: str) -> list[str]:
    """The string under `key` as a list of one, or of none."""
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return [value] if isinstance(value, str) else []


def _with_notes(text: str, notes: Sequence[str]) -> str:
    return f"{text} // {' '.join(notes)}" if notes else text


def _lines(text: str) -> list[str]:
    """Lines as Rust's `str::lines` cuts them: at \\n or \\r\\n only, no empty last line."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _json(value: Any) -> str:
    """Compact JSON as serde_json prints it; Python differs in how it writes a float."""
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_json(str(key))}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def _float(value: float) -> str:
    """Shortest digits, as Rust's ryu lays them out: plain from 1e-5 up to 1e16, else 1e20 and not 1e+20."""
    text = repr(value)
    if "e" not in text:
        return text
    digits, exponent = text.split("e")
    if int(exponent) == -5:
        sign = "-" if value < 0 else ""
        return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"
    return f"{digits}e{int(exponent)}"


# The two tools that gpt-oss was trained on, with the wording it was trained on (openai/harmony, src/chat.rs).
_BROWSER = tools_section(
    "browser",
    "Tool for browsing.\n"
    "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
    "Cite information from the tool using the following format:\n"
    "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
    "Do not quote more than 10 words directly from the tool output.\n"
    "sources=web (default: web)",
    (
        FunctionTool(
            "search",
            "Searches for information related to `query` and displays `topn` results.",
            {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "topn": {"type": "number", "default": 10},
                    "source": {"type": "string"},
                },
                "required": ["query"],
            },
        ),
        FunctionTool(
            "open",
            "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing"
            " `num_lines` lines.\n"
            "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
            "If `cursor` is not provided, the most recent page is implied.\n"
            "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
            "If `loc` is not provided, the viewport will be positioned at the beginning of the document or"
            " centered on the most relevant passage, if available.\n"
            "Use this function without `id` to scroll to a new location of an opened page.",
            {
                "type": "object",
                "properties": {
                    "id": {"type": ["number", "string"], "default": -1},
                    "cursor": {"type": "number", "default": -1},
                    "loc": {"type": "number", "default": -1},
                    "num_lines": {"type": "number", "default": -1},
                    "view_source": {"type": "boolean", "default": False},
                    "source": {"type": "string"},
                },
            },
        ),
        FunctionTool(
            "find",
            "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
            {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "cursor": {"type": "number", "default": -1}},
                "required": ["pattern"],
            },
        ),
    ),
)

_PYTHON = tools_section(
    "python",
    "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user."
    " This tool should be used for internal reasoning, but not for code that is intended to be visible to the"
    " user (e.g. when creating plots, tables, or files).\n"
    "\n"
    "When you send a message containing Python code to python, it will be executed in a stateful Jupyter"
    " notebook environment. python will respond with the output of the execution or time out after 120.0"
    " seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet access for this"
    " session is UNKNOWN. Depends on the cluster.",
    (),
)

BUILTIN_SECTIONS: Mapping[str, str] = {"browser": _BROWSER, "python": _PYTHON}
