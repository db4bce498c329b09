"""Where rows of metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from storage.errors import ConfigError


class Logger(Protocol):
    """Takes a step's numbers; `close` sends what is left."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_loggers(
    names: tuple[str, ...], folder: Path, settings: dict[str, Any], first: int = 0
) -> list[Logger]:
    """Returns the loggers of one run.

    Args:
        names: some of LOGGERS.
        folder: the run's; its last name is the run's name there.
        settings: what identifies the run, shown beside it.
        first: the next step that will be logged; what a killed run has logged from there on is to go,
            where that can be.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    found = []
    for name in names:
        try:
            found.append(LOGGERS[name](folder, settings, first))
        except ImportError as error:
            raise ConfigError(
                f"the package of the logger {name!r} is not installed", where="train.loggers",
                found=error, todo=f"pip install 'scholiast[{name}]', or leave {name} out; "
                "metrics.jsonl is always written",
            ) from error  # fmt: skip
    return found


def numbers_of(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields a row's numbers with dotted names, tables opened."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


class TensorBoard:
    """Event files in the run's folder, under tensorboard/."""

    def __init__(self, folder: Path, settings: dict[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A service with wandb's interface: project "scholiast", one run a student."""

    def __init__(self, module: Any, folder: Path, settings: dict[str, Any]) -> None:
        self._module = module
        name = f"{folder.parents[1].name}-{folder.name}"
        module.init(project="scholiast", name=name, config=settings)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


def _wandb(folder: Path, settings: dict[str, Any], first: int) -> Logger:
    import wandb

    return Tracker(wandb, folder, settings)


def _trackio(folder: Path, settings: dict[str, Any], first: int) -> Logger:
    import trackio

    return Tracker(trackio, folder, settings)


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}
