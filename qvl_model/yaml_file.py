"""A YAML loader that reads 1e-5 as a number and refuses duplicate keys."""

import re

import yaml

__all__ = ["Loader"]


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader with YAML 1.2's numbers (1e-5 is one, which PyYAML reads as text). Raises: yaml.YAMLError for a
    key given twice, of which PyYAML would silently take the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            try:
                repeated = name in seen
            except TypeError as error:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} cannot be a key", key.start_mark
                ) from error
            if repeated:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
