"""One YAML file → one strict, frozen configuration; `--set a.b=c` lays values over it.

An unknown key is an error that names its dotted path and the nearest valid name. Paths are relative
to the folder the command runs in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config_errors import explained
from pipeline.launch.options import ClusterOptions
from pipeline.yaml_text import LARGEST, load_yaml
from stages.options import CorpusOptions, Options, ReadingOptions, StoreOptions, TeacherOptions
from stages.target_options import FusionOptions, LossOptions
from stages.train_options import EvaluateOptions, StudentOptions, TrainOptions
from storage.errors import ConfigError
from storage.local_cache import LocalCache
from storage.remote import Root, root_of

BEFORE, FUSED, BASELINE = "before", "fused", "cross_entropy"
"""Names of a run's students; "fused" is also the ensemble's."""


_REPLACED = {
    "train.epochs": "steps", "train.steps": "epochs",
    "student.model": "config", "student.config": "model",
}  # fmt: skip
"""An override of the one drops the other, its sibling, from what the file says."""


class RunConfig(Options):
    """The whole of a run."""

    name: str = Field("run", min_length=1, description="Shown in the report.")
    run_dir: str = Field(description="Folder for students, evaluation and report.")
    corpus_dir: str | None = Field(
        None, description="Prepared blocks, a folder or a URL; default run_dir/corpus."
    )
    cache_dir: str | None = Field(
        None, description="Teachers' notes, a folder or a URL; default run_dir/cache."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU if there is one."
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads of torch; its own choice if not given."
    )
    assets: Literal["demo", "demo-large"] | None = Field(
        None, description="First build the demonstration's models and its text, or more of it."
    )
    corpus: CorpusOptions
    teachers: Annotated[dict[str, TeacherOptions], Field(min_length=1)]
    store: StoreOptions = StoreOptions()
    fusion: FusionOptions = FusionOptions()
    student: StudentOptions
    loss: LossOptions = LossOptions()
    train: TrainOptions
    evaluate: EvaluateOptions = EvaluateOptions()
    reading: ReadingOptions = ReadingOptions()
    cluster: ClusterOptions = ClusterOptions()

    @field_validator("run_dir")
    @classmethod
    def _local(cls, run_dir: str) -> str:
        if "://" in run_dir:
            raise ValueError("the run's folder is local; corpus_dir and cache_dir may be URLs")
        return run_dir

    @field_validator("teachers")
    @classmethod
    def _names(cls, teachers: dict[str, TeacherOptions]) -> dict[str, TeacherOptions]:
        for name in teachers:
            if (
                not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
                or name[0] == "."
            ):
                raise ValueError(f"{name!r} is a folder's name: letters, digits, '-', '_', '.'")
            if name in (BEFORE, FUSED, BASELINE):
                raise ValueError(
                    f"a teacher cannot be named {name!r}: reports use it for the ensemble or a student"
                )
        return teachers

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        """What stage two will need of stage one is asked for before stage one runs."""
        grid = (1.0, *self.store.temperatures)
        if self.loss.temperature not in grid:
            raise ValueError(
                f"loss.temperature {self.loss.temperature} is neither 1 nor in store.temperatures "
                f"{list(self.store.temperatures)}: the caches could not serve it"
            )
        tail = self.loss.tail(self.store.drawn)
        if self.fusion.mixing == "geometric" and tail != "bucket":
            raise ValueError(
                f"fusion.mixing geometric needs the tail as a bucket, and here it is {tail}: a product "
                "of powers of sampled or cut estimates is biased; set loss.target: bucket"
            )
        unknown = sorted(set(self.fusion.teachers or ()) - set(self.teachers))
        if unknown or self.fusion.teachers == ():
            raise ValueError(
                f"fusion.teachers must be some of {list(self.teachers)}, not {unknown or 'none'}"
            )
        self.fusion.require_teachers(self.fused_teachers)
        k = self.fusion.k
        if k is not None and k > self.store.entries:
            raise ValueError(
                f"fusion.k {k} is more than store.k, {self.store.entries}: that many are cached"
            )
        if k is not None and k < self.store.entries and self.store.drawn:
            raise ValueError(
                "fusion.k cannot be less than store.k where tail draws are cached, which stand for what "
                "is outside all of these entries: leave it out, or cache without draws (store.draws: 0)"
            )
        if k is not None and k != self.store.entries and self.train.decode == "device":
            raise ValueError("fusion.k goes with train.decode: cpu")
        self._check_pairs()
        if strangers := sorted(set(self.cluster.teachers) - set(self.teachers)):
            raise ValueError(f"cluster.teachers names no teacher: {strangers}")
        return self

    def _check_pairs(self) -> None:
        features, fused = self.loss.features, self.fused_teachers
        if not features.weight:
            return
        if not features.pairs:
            raise ValueError("loss.features.weight is set but loss.features.pairs is empty")
        if not any(self.teachers[name].feature_layers for name in fused):
            raise ValueError(
                f"loss.features.weight is set but none of {list(fused)} has feature_layers"
            )
        if features.pooled not in self.store.pooling:
            raise ValueError(
                f"loss.features.pooled is {features.pooled!r}, and store.pooling is "
                f"{list(self.store.pooling)}"
            )
        if features.kind == "gram" and self.train.batch_blocks * self.store.segments < 2:
            raise ValueError(
                "loss.features.kind gram compares the segments of a micro-batch, and with "
                "train.batch_blocks 1 and store.segments 1 there is only one: raise either"
            )
        for i, pair in enumerate(() if isinstance(features.pairs, str) else features.pairs):
            named = pair.teacher
            layers = named if isinstance(named, dict) else dict.fromkeys(fused, named)
            for name, layer in layers.items():
                stored = self.teachers[name].feature_layers if name in self.teachers else ()
                if layer not in stored:
                    raise ValueError(
                        f"loss.features.pairs.{i} wants layer {layer} of teacher {name!r}, and "
                        f"teachers.{name}.feature_layers is {list(stored)}"
                    )

    @property
    def fused_teachers(self) -> tuple[str, ...]:
        """The teachers that are fused, in the order of the configuration."""
        chosen = self.fusion.teachers
        return tuple(name for name in self.teachers if chosen is None or name in chosen)

    @property
    def run(self) -> Path:
        return Path(self.run_dir)

    @property
    def corpus_folder(self) -> Root:
        return self._root(self.corpus_dir) if self.corpus_dir else self.run / "corpus"

    @property
    def cache_folder(self) -> Root:
        return self._root(self.cache_dir) if self.cache_dir else self.run / "cache"

    def _root(self, place: str) -> Root:
        return root_of(place, self.local_cache)

    @property
    def local_cache(self) -> LocalCache:
        folder = Path(self.reading.local_cache).expanduser()
        return LocalCache(folder, self.reading.local_cache_bytes)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the configuration in a file with overrides laid over it.

    Args:
        path: a YAML file.
        overrides: texts like "train.lr=3e-4"; the value is YAML; list items by index.

    Raises:
        ConfigError: the file, a key or a value is wrong; every problem is listed.
    """
    return validated(merged(path, overrides), path, overrides)


def validated(raw: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the configuration that a mapping is.

    Args:
        path, overrides: where it was said, for messages.

    Raises:
        ConfigError: every problem is listed.
    """
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise explained(error, RunConfig, path, overrides) from None
    return _settled(config)


def settled(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Returns overrides that say, for other machines, what `auto` precisions came to on this one.

    Raises:
        ConfigError: as `load_config`.
    """
    raw = merged(path, overrides)
    config = validated(raw, path, overrides)
    found = [
        f"teachers.{name}.dtype={config.teachers[name].dtype}"
        for name, said in raw["teachers"].items()
        if said.get("dtype") == "auto"
    ]
    if raw.get("train", {}).get("precision") == "auto":
        found.append(f"train.precision={config.train.precision}")
    return found


def _settled(config: RunConfig) -> RunConfig:
    """Returns the configuration with precisions that leave the choice to the machine chosen."""
    teachers = [name for name, options in config.teachers.items() if options.dtype == "auto"]
    if not teachers and config.train.precision != "auto":
        return config
    from stages.device import choose_device, multiplies_bfloat16  # torch takes a second to import

    wide = not multiplies_bfloat16(choose_device(config.device))
    chosen = {"dtype": "float32" if wide else "bfloat16"}
    changed = {name: config.teachers[name].model_copy(update=chosen) for name in teachers}
    train = config.train
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "fp32" if wide else "bf16"})
    return config.model_copy(update={"teachers": {**config.teachers, **changed}, "train": train})


def merged(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what a file and overrides say, before any of it is checked.

    Raises:
        ConfigError: the file is not a YAML mapping, or an override does not fit it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            raw = load_yaml(file.read(LARGEST + 1))
    except OSError as error:
        raise ConfigError(
            f"the configuration cannot be read: {error.strerror}", where=path,
            todo="give the path of a YAML file, such as pipeline/configs/demo.yaml",
        ) from error  # fmt: skip
    except ValueError as error:  # no UTF-8 is one, too
        raise ConfigError(
            "the configuration is not YAML", where=path, found=error, todo="mend the line named"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(
            "the configuration is not a mapping", where=path, found=type(raw).__name__,
            todo="write keys and values, as in pipeline/configs/demo.yaml",
        )  # fmt: skip
    for text in overrides:
        override(raw, text)
    return raw


def override(raw: dict[str, Any], text: str) -> None:
    """Lays one "key=value" over what a configuration says, in place. Of two keys of which one alone may
    be given, the other goes.

    Raises:
        ConfigError: it is none, or does not fit what is there.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(
            "an override is not key=value",
            where="--set",
            found=text,
            todo="write --set train.lr=3e-4",
        )
    node: Any = raw
    *path, last = key.split(".")
    try:
        parsed = _yaml_value(value)
        for name in path:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        if isinstance(node, list):
            node[int(last)] = parsed
        else:
            node[last] = parsed
        if parsed is not None and key in _REPLACED:
            node.pop(_REPLACED[key], None)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            "an override does not fit the configuration", where=f"--set {text}", found=str(error),
            todo="check the dotted key; list items are named by their index, from 0",
        ) from error  # fmt: skip


def _yaml_value(text: str) -> Any:
    value = load_yaml(text)
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for text
        try:
            return float(value)
        except ValueError:
            return value
    return value
