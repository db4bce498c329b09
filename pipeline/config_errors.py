"""What is wrong with a configuration, told by the keys that a person wrote."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from storage.errors import ConfigError


def explained(
    error: ValidationError, model: type[BaseModel], path: Path, overrides: Sequence[str] = ()
) -> ConfigError:
    """Returns the error that lists every problem.

    Args:
        model: of the whole configuration.
        path, overrides: where it was said. Where overrides alone are to blame, they are named.
    """
    problems, places = [], []
    for item in error.errors(include_url=False):
        loc = tuple(part for part in item["loc"] if not str(part).startswith("["))  # tags of unions
        key = ".".join(str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            told = f"unknown key{_nearest(model, loc)}"
        elif item["type"] == "missing":
            told = "missing"
        else:
            told = item["msg"].removeprefix("Value error, ")
            if key and not isinstance(item["input"], Mapping):  # a whole section says nothing
                told += f" (found {item['input']!r:.60})"
        problems.append(f"{key}: {told}".removeprefix(": "))
        places.append(_override_of(key, told, overrides) or str(path))
    several = len(problems) > 1
    more = f" (and {len(problems) - 1} more)" if several else ""
    return ConfigError(
        f"the configuration is not valid: {problems[0]}{more}", where=", ".join(dict.fromkeys(places)),
        expected="keys and values as in pipeline/README.md",
        found="\n             ".join(problems) if several else None, todo="mend the keys named",
    )  # fmt: skip


def _override_of(key: str, told: str, overrides: Sequence[str]) -> str | None:
    """Returns the override, as it was typed, that gave a key or what holds it; of a problem between a
    section's keys one whose name in that section the problem tells."""
    for text in reversed(overrides):
        name = text.partition("=")[0]
        if key and (key == name or key.startswith(f"{name}.")):
            return f"--set {text}"
        inner = name.removeprefix(f"{key}." if key else "")
        if (not key or inner != name) and re.search(rf"(?<![\w.]){re.escape(inner)}\b", told):
            return f"--set {text}"
    return None


def _nearest(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Returns a hint: the valid name most like an unknown key, or the valid names."""
    names = sorted(_fields_at(model, loc[:-1]))
    close = difflib.get_close_matches(str(loc[-1]), names, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid here: {', '.join(names)}" if names else ""


def _fields_at(model: type[BaseModel], loc: Sequence[int | str]) -> Mapping[str, Any]:
    """Returns the fields of the model that lies at a place in the configuration."""
    parts = iter(loc)
    for part in parts:
        if str(part) not in model.model_fields:
            return {}
        annotation: Any = model.model_fields[str(part)].annotation
        inner = _inner_model(annotation)
        if inner is None:
            return {}
        if inner is not annotation:  # a mapping or a list of them: the next part names one
            next(parts, None)
        model = inner
    return model.model_fields


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """Returns the model that an annotation is, or holds: dict[str, Model], tuple[Model, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inner_model(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)
