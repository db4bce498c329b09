"""What is compared: the rows of the four tables, each a list of settings over one configuration.

Every setting that a row's meaning hangs on is pinned here (COMMON, PINNED, EVALUATION), so that another
default in the package or the configuration does not change what a row is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from stages.weighting import Gold, looks_at_gold
from storage.errors import ConfigError

COMMON: Final = (
    "loss.alpha=0.9", "loss.temperature=1.0", "loss.divergence=forward_kl", "loss.target=auto",
    "loss.features.weight=0.0", "loss.features.kind=cosine", "fusion.weights=entropy",
    "fusion.tau=1.0", "train.baseline=false", "train.epochs=null",
)  # fmt: skip
"""The reference that a row's own settings are laid over, and the target that all rows are measured by."""

PINNED: Final = (
    "fusion.per=token", "fusion.normalise=false", "fusion.prior={}", "fusion.floor=0.0",
    "fusion.ramp=0.0", "fusion.mixing=arithmetic", "fusion.teachers=null", "fusion.k=null",
    "loss.alpha_schedule=constant", "loss.features.projection=linear", "loss.features.pooled=mean",
)  # fmt: skip
"""What else a row's meaning hangs on, as the package has it by default; laid first, and no part of a
run's key, so that a setting that is added here leaves finished runs as they are."""

EVALUATION: Final = (
    "evaluate.samples=0", "evaluate.prompts=8", "evaluate.prompt_tokens=48",
    "evaluate.new_tokens=64", "evaluate.sample_temperature=1.0", "evaluate.resamples=0",
    "evaluate.seed=0",
)  # fmt: skip

APPROACHES, SENSITIVITY = "approaches", "sensitivity"
ENCODINGS, MULTITASK = "encodings", "multi-task"
NUMBERS: Final = {"1": APPROACHES, "2": SENSITIVITY, "3": ENCODINGS, "4": MULTITASK}

CE, UNIFORM, ENTROPY, FULL = "cross-entropy only", "uniform", "entropy", "entropy + features"
ONLINE, ENSEMBLE, SINGLE = "online, whole distributions", "ensemble, no training", "single: "
ALONE: Final = "teacher alone: "
REFERENCE: Final = "temperature 1.0"
"""The row of table 2 that changes nothing, by this name or others."""

Kind = Literal["cached", "online", "notes"]


@dataclass(frozen=True)
class Row:
    """One row of one table.

    Attributes:
        table, name: where it is shown.
        overrides: settings over the configuration and COMMON.
        kind: a student taught from caches; one whose teachers run beside it; or no student at all,
            teachers' figures from their notes.
        group: what it belongs to within its table.
        cache: folder of its own caches; "" is the configuration's.
        weak: whether the deliberately weak teacher takes part.
        mixed: whether it learns the mix with the instruction task.
        notes_of: kind notes: "fused", or a teacher.
    """

    table: str
    name: str
    overrides: tuple[str, ...] = ()
    kind: Kind = "cached"
    group: str = ""
    cache: str = ""
    weak: bool = False
    mixed: bool = False
    notes_of: str = ""

    @property
    def gold(self) -> Gold:
        """Which gold tokens its weights look at: of the rows trained on, or of a calibration part."""
        chosen = [
            text.partition("=")[2] for text in self.overrides if text.startswith("fusion.weights=")
        ]
        return looks_at_gold(chosen[-1]) if chosen else ""

    @property
    def seeded(self) -> bool:
        """Whether a seed changes anything."""
        return self.kind != "notes"


def all_rows(raw: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of every table.

    Args:
        raw: the configuration they are laid over, as it is written.
    """
    teachers = list(raw["teachers"])
    return [
        *approaches(teachers, raw), *sensitivity(teachers, raw), *encodings(teachers),
        *multitask(teachers, raw),
    ]  # fmt: skip


def approaches(teachers: Sequence[str], raw: Mapping[str, Any]) -> list[Row]:
    """Returns table 1: what a student learns from."""
    t = APPROACHES
    return [
        Row(t, CE, ("loss.alpha=0.0",)),
        *(Row(t, SINGLE + name, (f"fusion.weights=single:{name}",)) for name in teachers),
        Row(t, UNIFORM, ("fusion.weights=uniform",)),
        Row(t, "max_prob", ("fusion.weights=max_prob",)),
        Row(t, "confidence", ("fusion.weights=confidence",)),
        Row(t, "min_ce", ("fusion.weights=min_ce",)),
        Row(t, "em", ("fusion.weights=em",)),
        Row(t, ENTROPY),
        Row(t, FULL, _features(raw, 0.1)),
        Row(t, ONLINE, kind="online"),
        Row(t, ENSEMBLE, kind="notes", notes_of="fused"),
        *(Row(t, ALONE + name, kind="notes", notes_of=name) for name in teachers),
    ]


def sensitivity(teachers: Sequence[str], raw: Mapping[str, Any]) -> list[Row]:
    """Returns table 2: one setting changed at a time; equal settings are one run of table 1."""
    t = SENSITIVITY
    few = [
        Row(t, f"{n} teachers", (f"fusion.teachers={json.dumps(teachers[:n])}",), group="teachers")
        for n in range(2, len(teachers))
    ]
    return [
        *(
            Row(t, f"temperature {x}", (f"loss.temperature={x}",), group="temperature")
            for x in (1.0, *raw.get("store", {}).get("temperatures", [1.5, 2.0]))
        ),
        *(
            Row(t, f"1 teacher: {name}", (f"fusion.weights=single:{name}",), group="teachers")
            for name in teachers
        ),
        *few,
        Row(t, f"{len(teachers)} teachers", group="teachers"),
        Row(t, "with a weak one", weak=True, group="teachers"),
        Row(t, "with a weak one, uniform", ("fusion.weights=uniform",), weak=True, group="teachers"),
        *(Row(t, f"alpha {x}", (f"loss.alpha={x}",), group="alpha") for x in (0.0, 0.5, 0.9, 1.0)),
        *(Row(t, f"tau {x}", (f"fusion.tau={x}",), group="tau") for x in (0.25, 1.0, 4.0)),
        *(
            Row(t, f"features {x}", _features(raw, x), group="features")
            for x in (0.0, 0.1, 1.0)
        ),
        *(
            Row(t, f"features {x}, wrong layers", _features(raw, x, wrong=True), group="features")
            for x in (0.1, 1.0)
        ),
    ]  # fmt: skip


def encodings(teachers: Sequence[str]) -> list[Row]:
    """Returns table 3: what of the teachers' distributions is kept, each from a cache of its own."""
    t = ENCODINGS
    heads = [
        Row(
            t, f"{name}, k = {k}", (*_store("balanced", k, 0, teachers), f"loss.target={target}"),
            group=name, cache=f"balanced-{k}-0",
        )
        for name, target in (("renormalised", "renormalised"), ("bucket", "bucket"))
        for k in (8, 16, 64)
    ]  # fmt: skip
    drawn = [
        Row(
            t, f"{k} + {s} draws", _store("compact", k, s, teachers),
            group="sampling" if k == 1 else "head + draws", cache=f"compact-{k}-{s}",
        )
        for k, s in ((1, 8), (1, 16), (1, 32), (4, 12), (8, 8), (16, 16), (32, 32))
    ]  # fmt: skip
    return [
        Row(t, CE, ("loss.alpha=0.0",), group="bounds"), *heads, *drawn,
        Row(t, ONLINE, kind="online", group="bounds"),
    ]  # fmt: skip


def multitask(teachers: Sequence[str], raw: Mapping[str, Any]) -> list[Row]:
    """Returns table 4: the mix of language modelling and an instruction task with a loss mask."""
    chosen = (CE, UNIFORM, ENTROPY, FULL)
    return [
        Row(MULTITASK, row.name, row.overrides, mixed=True)
        for row in approaches(teachers, raw)
        if row.name in chosen or row.name.startswith(SINGLE)
    ]


def _store(preset: str, k: int, draws: int, teachers: Sequence[str]) -> tuple[str, ...]:
    """Returns a cache of the distributions alone: bytes for features and temperatures would hide them."""
    return (
        f"store.preset={preset}", f"store.k={k}", f"store.draws={draws}", "store.temperatures=[]",
        *(f"teachers.{name}.feature_layers=[]" for name in teachers),
    )  # fmt: skip


def _features(raw: Mapping[str, Any], weight: float, wrong: bool = False) -> tuple[str, ...]:
    """Returns alignment of the configured layers, or of the student's first with the teachers' last.

    Raises:
        ConfigError: a teacher's features are not stored.
    """
    layers = {name: teacher.get("feature_layers") for name, teacher in raw["teachers"].items()}
    if not all(layers.values()):
        raise ConfigError(
            "the evidence aligns features of every teacher", where="teachers.NAME.feature_layers",
            found=layers, todo="name a layer of each",
        )  # fmt: skip
    if not wrong:
        return (f"loss.features.weight={weight}",)
    pairs = [{"student": 1, "teacher": {name: max(found) for name, found in layers.items()}}]
    return (f"loss.features.weight={weight}", f"loss.features.pairs={json.dumps(pairs)}")
