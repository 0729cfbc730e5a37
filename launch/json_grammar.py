"""JSON schema -> the grammar of a JSON text, as the engine takes it (`parallel.engine.constraint.Section.grammar`).

llguidance reads the schema: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md lists the keywords
that it knows. Knows no tokens and no requests.
"""

from collections.abc import Mapping
from typing import Any

# Between two tokens of JSON stands at most one blank, after a comma or a colon: where any white space may come, a model
# may write nothing else for ever.
_LAYOUT = {"whitespace_flexible": False, "whitespace_pattern": None, "item_separator": ", ?", "key_separator": ": ?"}


def json_grammar(schema: Mapping[str, Any], strict: bool) -> str:
    """strict: every keyword holds, and one that cannot (`not`, `if`, `uniqueItems`, ...) is a flaw; else such keywords
    are passed over, and oneOf is read as anyOf. Raises ValueError if it is no JSON."""
    import llguidance  # here: not in the base install

    options: Any = _LAYOUT | {"lenient": not strict, "coerce_one_of": not strict}
    return llguidance.LLMatcher.grammar_from_json_schema(dict(schema), overrides=options)


def flaw_of(grammar: str) -> str | None:
    """Why it does not compile, in a line; None if it does. It is compiled without a vocabulary: what shows only with
    one the engine says."""
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    said = llguidance.LLMatcher.validate_grammar(grammar, None, limits=limits).strip()
    return None if not said or said.startswith("WARNING") else " ".join(said.split())
