"""Check JSON against the schemas of the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """Yield what in a value violates the JSON schema; knows only some of the keywords."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "integer": int,
        "null": type(None),
        "boolean": bool,
    }
    wanted = schema.get("type", [])
    if wanted and not any(isinstance(value, kinds[kind]) for kind in ([wanted] if isinstance(wanted, str) else wanted)):
        yield f"{value!r} is not of type {wanted}"
    if value != schema.get("const", value) or value not in schema.get("enum", [value]):
        yield f"{value!r} is not allowed"
    if isinstance(value, dict):
        yield from (f"{name} is missing" for name in schema.get("required", []) if name not in value)
        for name, inner in value.items():
            rule = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from violations(inner, rule, root) if rule is not False else [f"{name} is unknown"]
