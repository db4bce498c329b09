"""The configuration: strict, and every mistake named with its place and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Lab
from pydantic import ValidationError

from pipeline.config import load_config, settled
from stages import device
from storage.errors import ConfigError

DEMO = Path(__file__).resolve().parents[2] / "pipeline/configs/demo.yaml"


def test_demo_is_valid_and_frozen() -> None:
    config = load_config(DEMO)
    assert list(config.teachers) == ["generalist", "code", "bible"]
    with pytest.raises(ValidationError):
        config.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("hardware", "dtype", "precision"), [(True, "bfloat16", "bf16"), (False, "float32", "fp32")]
)
def test_auto_precision_is_what_the_machine_multiplies(
    monkeypatch: pytest.MonkeyPatch, hardware: bool, dtype: str, precision: str
) -> None:
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: hardware)
    said = ["teachers.code.dtype=float32", "device=cpu"]
    config = load_config(DEMO, said)
    assert config.train.precision == precision
    found = {name: teacher.dtype for name, teacher in config.teachers.items()}
    assert found == {"generalist": dtype, "code": "float32", "bible": dtype}
    told = settled(DEMO, said)  # to other machines, as overrides
    assert told == [
        f"teachers.generalist.dtype={dtype}", f"teachers.bible.dtype={dtype}",
        f"train.precision={precision}",
    ]  # fmt: skip
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: not hardware)
    assert load_config(DEMO, [*said, *told]) == config


def test_explicit_precision_does_not_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: pytest.fail("looked"))
    evidence = DEMO.with_name("evidence.yaml")
    assert load_config(evidence).train.precision == "bf16" and settled(evidence) == []


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("train.lrr=1", r"train\.lrr: unknown key; did you mean 'lr'\?"),
        ("teachers.code.dtyp=float32", r"teachers\.code\.dtyp: unknown key; did you mean 'dtype'"),
        ("loss.features.weigth=1", r"loss\.features\.weigth: unknown key; did you mean 'weight'"),
        ("corpus.sources.0.pat=x", r"corpus\.sources\.0\.pat: unknown key; did you mean 'path'"),
        ("zzz=1", "zzz: unknown key; valid here: assets"),
        ("train.lr=fast", r"train\.lr: .*number"),
        ("train.lr=-1", r"train\.lr: .*greater than 0"),
        ("store.k=0", r"store\.k: .*greater than or equal to 1"),
        ("loss.alpha=2", r"loss\.alpha"),
        ("train.epochs=null", "give either `epochs` or `steps`"),
        ("train={epochs: 1, steps: 1}", "give either `epochs` or `steps`"),
        ("device=gpu", "device"),
        ("teachers={}", "teachers"),
        ("corpus.sources.9.path=x", "override does not fit"),
        ("train.lr", "not key=value"),
        ("store.preset=best", r"store\.preset"),
        ("store.temperatures=[1.0, 2.0]", "distinct, not 1"),
        ("store.temperatures=[2.0, 2.0]", "distinct, not 1"),
        ("store.temperatures=[1e30]", "between 0.05 and 100"),
        ("loss.divergence=kl", r"loss\.divergence: .*'forward_kl'.*'tv'"),
        ("loss.beta=1", r"loss\.beta: .*less than 1"),
        ("loss.skew=0", r"loss\.skew: .*greater than 0"),
        ("loss.target=draws", "draws 0.*possible are auto, bucket, renormalised and residual"),
        ("loss={divergence: js, target: residual}", "can be auto or bucket, and residual goes"),
        ("loss={divergence: tv, target: draws}", "can be auto or bucket, and draws goes"),
        ("loss={alpha_schedule: wsd, alpha_decay: 0.95}", "together exceed the run"),
        ("store.pooling=[mean, mean]", "a pooling is named twice"),
        ("store.pooling=[]", r"store\.pooling: .*at least 1"),
        ("loss.features.pooled=last", r"pooled is 'last', and store.pooling is \['mean'\]"),
        ("loss.features.kind=gram", "train.batch_blocks 1 and store.segments 1 there is only one"),
        ("loss.features.pairs=atuo", r"loss\.features\.pairs: Input should be 'auto'"),
        ("loss.features.pairs=[{studnt: 1}]", r"pairs\.0\.studnt: unknown key; did you mean 'stud"),
    ],
)
def test_mistakes_are_named(override: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        load_config(DEMO, [override])
    assert caught.value.exit_code == 2


def test_an_override_of_a_length_replaces_the_other() -> None:
    train = load_config(DEMO, ["train.steps=5"]).train
    assert train.steps == 5 and train.epochs is None
    train = load_config(DEMO, ["train.steps=5", "train.epochs=2"]).train
    assert train.steps is None and train.epochs == 2
    student = load_config(DEMO, ["student.config=c", "student.keep_layers=null"]).student
    assert student.config == "c" and student.model is None


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["seed=1", "train.lr=-1"], "--set train.lr=-1, --set seed=1"),
        (["loss.temperature=3.0", "store.k=8", "threads=2"], "--set loss.temperature=3.0"),
        (["store.k=8", "fusion.k=9", "threads=2"], "--set fusion.k=9"),
        (["train.schedule=wsd", "train.decay=0.99"], "--set train.decay=0.99"),
        (["loss={alpha: 7}"], "--set loss={alpha: 7}"),
        (["student.config=c", "threads=2"], "--set student.config=c"),
        (["train.epochs=null"], "--set train.epochs=null"),
    ],
)
def test_overrides_that_are_wrong_are_named_and_not_the_file(
    overrides: list[str], where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, overrides)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("written", "override"),
    [
        ("cluster: {teachers: {typo: {}}}\n", "fusion.teachers=[code]"),
        ("loss: {temperature: 3.0}\n", "student.keep_layers.1=5"),
        ("fusion: {k: 99}\n", "train.lr=1e-4"),
    ],
)
def test_overrides_that_are_right_are_not_blamed(
    tmp_path: Path, written: str, override: str
) -> None:
    raw = yaml.safe_load(DEMO.read_text()) | yaml.safe_load(written)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert caught.value.where == str(file)


def test_one_problem_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(DEMO.read_text().replace("threads:", "").replace("name: demo", "nmae: demo"))
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["threads=2"])
    assert caught.value.where == str(file) and str(caught.value).count("did you mean 'name'") == 1


def test_an_error_in_a_pair_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, ["loss.features.pairs=[{student: 0, teacher: 29}]"])
    assert "pairs.0.student: Input should be greater than or equal to 1" in caught.value.what
    assert "more)" not in caught.value.what


def test_features_may_be_asked_for_in_other_ways() -> None:
    config = load_config(
        DEMO, ["store.pooling=[last, mean]", "store.segments=2", "loss.features.pooled=last",
               "loss.features.kind=gram", "loss.features.pairs=auto"],
    )  # fmt: skip
    assert config.store.pooling == ("mean", "last") and config.loss.features.pairs == "auto"
    config = load_config(DEMO, ["loss.features.weight=0", "loss.features.kind=gram"])
    assert config.loss.features.kind == "gram"


def test_the_tail_follows_the_divergence_and_the_cache() -> None:
    def tail(*overrides: str) -> str:
        config = load_config(DEMO, overrides)
        return config.loss.tail(config.store.drawn)

    assert tail() == "bucket" and tail("store.draws=8") == "draws"
    assert tail("store.draws=8", "loss.divergence=reverse_kl") == "bucket"
    assert tail("store.draws=8", "loss.target=bucket") == "bucket"
    assert tail("loss.target=residual") == "residual"


def test_overrides_are_yaml_values() -> None:
    config = load_config(
        DEMO, ["train.lr=3e-4", "store.k=16", "corpus.sources.1.domain=c", "train.epochs=null",
               "train.steps=7", "fusion.static={code: 2, bible: 1}", "store.temperatures=[2.0]"],
    )  # fmt: skip
    assert config.train.lr == 3e-4 and config.store.k == 16 and config.train.steps == 7
    assert config.corpus.sources[1].domain == "c"
    assert config.fusion.static == {"code": 2.0, "bible": 1.0}
    assert config.store.temperatures == (2.0,)


@pytest.mark.parametrize(
    ("text", "match"),
    [("a: [", "not YAML"), ("- a", "not a mapping"), ("run_dir: x", "missing")],
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_yaml_cannot_construct_objects(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(path)


def test_teacher_names_cannot_leave_the_cache(lab: Lab) -> None:
    config: dict[str, Any] = yaml.safe_load(lab.write().read_text())
    config["teachers"]["../up"] = config["teachers"]["one"]
    path = lab.root / "bad.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="folder's name"):
        load_config(path)


@pytest.mark.parametrize("name", ["fused", "before", "cross_entropy"])
def test_teachers_do_not_take_the_students_names(lab: Lab, name: str) -> None:
    config: dict[str, Any] = yaml.safe_load(lab.write().read_text())
    config["teachers"][name] = config["teachers"]["one"]
    path = lab.root / "taken.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=f"cannot be named '{name}'"):
        load_config(path)
