"""Ready configurations for families of models, to start from: pipeline/configs/*.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "configs"


_OF_OUR_OWN = ("demo", "evidence")  # they make their own models


def names() -> list[str]:
    """Returns the families there are."""
    return sorted({path.stem for path in FOLDER.glob("*.yaml")}.difference(_OF_OUR_OWN))


def family(name: str) -> dict[str, Any]:
    """Returns what a ready configuration says.

    Raises:
        ConfigError: there is no such family.
    """
    from pipeline.config import merged

    if name not in names():
        raise ConfigError(
            "there is no ready configuration of this name", where="--family",
            expected=f"one of {', '.join(names())}", found=name, todo="name one of these",
        )  # fmt: skip
    return merged(FOLDER / f"{name}.yaml")
