"""The configuration reference, from the models themselves: `python -m pipeline.reference`.

The table stands in pipeline/README.md between two marks; a test holds it to what this prints.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.config import RunConfig


def rows(
    model: type[BaseModel] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yields (dotted key, type, default, meaning) of every key, sections opened."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inner, suffix = _section(field.annotation)
        if inner is None or _words(field.annotation):
            default = field.get_default(call_default_factory=True)
            shown = "required" if default is PydanticUndefined else _value(default)
            yield key, _type(field.annotation), shown, field.description or ""
        if inner is not None:
            yield from rows(inner, f"{key}{suffix}.")


def table() -> str:
    """Returns the reference as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, meaning in rows():
        cells = [f"`{key}`", kind, default, meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _section(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Returns the model that a key opens and what stands for its items: a.NAME.b, a.0.b."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _section(arguments[0])
    if origin in (types.UnionType, Union):
        return next((found for found in map(_section, arguments) if found[0]), (None, ""))
    if origin is dict:
        return _section(arguments[1])[0], ".NAME"
    if origin is tuple and arguments:
        return _section(arguments[0])[0], ".0"
    return None, ""


def _words(annotation: Any) -> tuple[Any, ...]:
    """Returns the words that may stand in a section's place."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (types.UnionType, Union):
        return tuple(word for argument in arguments for word in _words(argument))
    return arguments if origin is Literal else ()


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{value}`"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, Union):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is tuple:
        inner = _section(arguments[0])[0]
        return "list" if inner else f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} → {_type(arguments[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


if __name__ == "__main__":
    print(table())
