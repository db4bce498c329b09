"""The configuration's JSON schema: current, whole, and of one mind with the loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import Lab

from pipeline.config import load_config, merged
from pipeline.schema import DRAFT, PATH, schema
from storage.errors import ConfigError

CONFIGS = sorted(PATH.parent.glob("*.yaml"))
FIRST_LINE = "# yaml-language-server: $schema=schema.json"


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_the_file_is_current() -> None:
    assert json.loads(PATH.read_text()) == schema(), "run `python -m pipeline.schema`"
    assert schema()["$schema"] == DRAFT == jsonschema.Draft202012Validator.META_SCHEMA["$id"]


def sections(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "properties" in node:
            yield node
        for inner in node.values():
            yield from sections(inner)


def test_every_key_has_a_meaning_and_no_section_takes_strangers() -> None:
    for section in sections(schema()):
        assert section["additionalProperties"] is False
        for name, key in section["properties"].items():
            assert key.get("description"), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_ready_configurations_are_valid_and_name_it(path: Path, validator: Any) -> None:
    assert path.read_text().splitlines()[0] == FIRST_LINE
    validator.validate(yaml.safe_load(path.read_text()))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"train__steps": None, "train__epochs": 2, "train__lr": 1},
    {"student": {"model": "org/name", "lora": {"rank": 4}, "trust_remote_code": True}},
    {"student": {"config": "small.json"}},
    {"loss__features": {"weight": 0.5, "pairs": "auto"}},
    {"loss__features": {"weight": 0.5, "pairs": [{"student": 1, "teacher": {"one": 2, "two": 2}}]}},
    {"fusion": {"weights": "static", "static": {"one": 1, "two": 3}}},
    {"fusion__teachers": ["two"], "loss__temperature": 2.0},
    {
        "cluster": {
            "defaults": {"gpus": 1, "time": "1:00:00"},
            "teachers": {"one": {"memory": "64G"}},
        }
    },
    {"corpus_dir": "s3://bucket/corpus", "threads": None, "device": "cuda:1"},
    {"store": {"k": 16, "preset": "compact", "temperatures": []}, "loss__target": "bucket"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "plain")
def test_what_the_loader_takes_the_schema_takes(
    lab: Lab, changes: dict[str, Any], validator: Any
) -> None:
    path = lab.write(**changes)
    load_config(path)
    validator.validate(merged(path))


def test_numbers_of_yaml_1_1_are_taken_by_both(lab: Lab, validator: Any) -> None:
    path = lab.write()
    path.write_text(path.read_text().replace("lr: 0.003", "lr: 3e-3"))
    raw = merged(path)
    assert raw["train"]["lr"] == "3e-3"  # text, to YAML 1.1
    assert load_config(path).train.lr == 3e-3
    validator.validate(raw)
    merged_again = merged(path, ["corpus.sources.0.heldout=0.5", "train.lr=1e-3"])
    validator.validate(merged_again)
    assert merged_again["corpus"]["sources"][0]["heldout"] == 0.5


STRANGERS: list[dict[str, Any]] = [
    {"trian": {}},
    {"train__learning_rate": 1e-3},
    {"teachers__one__modell": "x"},
    {"loss__features__weights": 1},
    {"train__lr": "fast"},
    {"train__lr": -1.0},
    {"device": "gpu"},
    {"store__k": 0},
]


@pytest.mark.parametrize("changes", STRANGERS, ids=lambda changes: str(changes))
def test_what_one_refuses_the_other_refuses(
    lab: Lab, changes: dict[str, Any], validator: Any
) -> None:
    path = lab.write(**changes)
    with pytest.raises(ConfigError):
        load_config(path)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(merged(path))
