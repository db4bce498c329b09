"""The configuration's JSON schema, from the models themselves: `python -m pipeline.schema`.

It stands in configs/schema.json, where editors find it by the first line of each configuration
(`# yaml-language-server: $schema=schema.json`), and a test holds it to what this writes. What depends
on several keys at once (either epochs or steps) only `scholiast` itself can tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from pipeline.config import RunConfig

PATH: Final = Path(__file__).parent / "configs" / "schema.json"
DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"

_NUMBER_TEXT: Final = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"


class _Generator(GenerateJsonSchema):
    """What our loader takes: it reads YAML 1.1, where 1e-3 (without a point) is text."""

    def float_schema(self, schema: core_schema.FloatSchema) -> dict[str, Any]:
        number = super().float_schema(schema)
        return {"anyOf": [number, {"type": "string", "pattern": _NUMBER_TEXT}]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a key's name with capitals tells an editor nothing


def schema() -> dict[str, Any]:
    """Returns the schema of a configuration file, JSON Schema draft 2020-12."""
    made = RunConfig.model_json_schema(schema_generator=_Generator)
    for section in (made, *made["$defs"].values()):
        for key in section["properties"].values():
            _describe(key, made["$defs"])
    return {"$schema": DRAFT, **made, "title": "A run of scholiast"}


def _describe(key: dict[str, Any], sections: dict[str, Any]) -> None:
    """Gives a key that opens a section, or holds several, the section's meaning; its keys have their
    own defaults."""
    inner = next((key[k] for k in ("items", "additionalProperties") if k in key), key)
    if isinstance(inner, dict) and "$ref" in inner:
        key.pop("default", None)
        key.setdefault("description", sections[inner["$ref"].rsplit("/", 1)[1]]["description"])


def text() -> str:
    """Returns the schema as it stands in the file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    print(PATH)
