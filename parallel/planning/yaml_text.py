"""YAML -> values, with a key that comes twice in one mapping as an error: PyYAML takes the last of them without a word.

Knows no key. PyYAML is loaded when it is used, so that `--help` is fast.
"""

from typing import Any


def load_yaml(text: str, *, typed: bool = True) -> Any:
    """What `text` says; not typed: with every scalar as the text it is. Raises yaml.YAMLError."""
    import yaml

    loader: Any = yaml.SafeLoader if typed else yaml.BaseLoader

    class Once(loader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.MarkedYAMLError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Once)
