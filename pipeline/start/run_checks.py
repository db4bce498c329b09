"""What `scholiast doctor CONFIG` looks at: that run's models, tokenizers, text and folders."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.console import human_bytes
from pipeline.planning.fits import tail_problem
from pipeline.start.checks import BAD, OK, WARN, Check, failed, folder
from pipeline.start.models import ModelFacts, look_at, look_at_config
from pipeline.start.sources import Found, count_tokens, sides
from pipeline.start.sources import look_at as look_at_source
from stages.options import SourceOptions
from stages.teacher_jobs import COMPRESSION
from storage.errors import ScholiastError
from storage.remote import RemotePath

_ROW_BYTES = 300.0 * COMPRESSION / 64  # of a token and entry on disk, about
_OPTIMIZER_BYTES = 16  # a trained parameter: float32 weight and gradient, two moments
_Models = dict[str, ModelFacts]


def check_run(config: RunConfig, *, load: bool = False) -> list[Check]:
    """Returns checks of all that a configuration names. Nothing is written or downloaded but small
    files of models that are not here yet.

    Args:
        load: also load each model, one after the other, and look at its head and attention.
    """
    checks = [*_extras(config), *_tail(config)]
    if config.assets and not all(Path(t.model).is_dir() for t in config.teachers.values()):
        found = "the demonstration's models and text are not built yet"
        checks.append(Check("models", "assets", WARN, found, "the first command builds them"))
        return [*checks, *_folders(config, 0.0)]
    models, tokenizer, told = _models(config)
    checks += told
    checks += [check for name, facts in models.items() for check in _fits(config, name, facts)]
    if tokenizer is not None:
        checks += _tokenizers(config, models, tokenizer)
    sources, told = _sources(config, tokenizer)
    checks += told
    tokens = sum(one.tokens for one in sources)
    checks += _folders(config, _needed(config, tokens, models.get("student")))
    if load and not any(check.state == BAD for check in checks):
        checks += _loaded(config, models)
    return checks


def _extras(config: RunConfig) -> Iterator[Check]:
    """Yields the optional packages that this configuration needs."""
    wanted: dict[str, str] = {name: name for name in config.train.loggers}
    if config.student.lora is not None:
        wanted["peft"] = "lora"
    for module, extra in wanted.items():
        there = find_spec(module) is not None
        yield Check("versions", module, OK if there else BAD,
                    "installed" if there else "needed by this configuration and not installed",
                    "" if there else f"run `pip install 'scholiast[{extra}]'`")  # fmt: skip


def _tail(config: RunConfig) -> Iterator[Check]:
    """Yields a warning where the loss sees less of the teachers than it could."""
    found = tail_problem(config)
    if found is not None:
        yield Check("loss", "tail", WARN, *found)


def _models(config: RunConfig) -> tuple[_Models, Any, list[Check]]:
    """Returns the models that can be looked at, the corpus's tokenizer if it is there, and checks."""
    from stages.model_files import locate
    from stages.tokenizer import load_tokenizer
    from storage.writer import is_imported, open_cache

    models, checks = {}, []
    for name, one in config.teachers.items():
        key = f"teachers.{name}"
        try:
            opened = open_cache(config.cache_folder / name)
        except ScholiastError:  # told of by the checks of folders
            opened = None
        if opened is not None and is_imported(opened[0]):
            checks.append(Check("models", key, OK, "its cache was imported: no model is needed"))
            continue
        try:
            models[key] = look_at(one.model, one.revision, key, trusted=one.trust_remote_code)
        except ScholiastError as error:
            checks.append(failed("models", key, error))
    student = config.student
    try:
        models["student"] = (
            look_at(student.model, student.revision, "student", trusted=student.trust_remote_code)
            if student.model is not None else look_at_config(str(student.config), "student")
        )  # fmt: skip
    except ScholiastError as error:
        checks.append(failed("models", "student", error))
    tokenizer, corpus = None, config.corpus
    try:
        place = locate(
            corpus.tokenizer, corpus.tokenizer_revision, "corpus.tokenizer", weights=False
        )
        tokenizer = load_tokenizer(place, "corpus.tokenizer")
    except ScholiastError as error:
        checks.append(failed("models", "corpus.tokenizer", error))
    return models, tokenizer, checks


def _fits(config: RunConfig, key: str, facts: ModelFacts) -> Iterator[Check]:
    """Yields a check of a model itself, and one of each thing asked of it that it has not."""
    told = Check("models", key, OK, f"{facts.model}: {facts.about}")
    if not facts.here:
        size = human_bytes(2.0 * facts.parameters)
        told = Check(
            "models", key, WARN, told.found, f"about {size} will be downloaded when needed"
        )
    yield told
    length = config.corpus.block_length
    if facts.context is not None and length > facts.context:
        yield Check("models", key, BAD, f"blocks of {length:,} are longer than its context, "
                    f"{facts.context:,}", "lower corpus.block_length")  # fmt: skip
    if key == "student":
        asked, first = list(config.student.keep_layers or ()), 0
    else:
        asked, first = list(config.teachers[key.partition(".")[2]].feature_layers), 1
    wrong = [layer for layer in asked if not first <= layer < facts.layers + first]
    if wrong and facts.layers:
        yield Check("models", key, BAD, f"it has no layers {wrong}: they go from {first} to "
                    f"{facts.layers - 1 + first}", "choose existing layers")  # fmt: skip
    yield from _memory(config, key, facts)


def _memory(config: RunConfig, key: str, facts: ModelFacts) -> Iterator[Check]:
    """Yields a warning where weights alone do not fit the device."""
    from pipeline.start import machine
    from stages.device import choose_device

    try:
        device = choose_device(config.device)
    except ScholiastError:
        return  # told of the device itself
    gpus = machine.gpus() if device.type == "cuda" else []
    memory = gpus[device.index or 0].memory if gpus else machine.memory_bytes()
    if key == "student":
        kept = config.student.keep_layers
        count = facts.parameters_with(len(kept)) if kept is not None else facts.parameters
        needed = count * (4 if config.student.lora else _OPTIMIZER_BYTES)
        todo = "keep fewer layers, use student.lora, or train on several ranks with train.parallel: fsdp"
    else:
        options = config.teachers[key.partition(".")[2]]
        needed = facts.parameters * (2 if options.dtype == "bfloat16" else 4)
        memory *= max(1, len(gpus)) if options.device_map else 1
        todo = f"set {key}.device_map: auto, or dtype: bfloat16, or use a larger machine"
    if needed > memory:
        what = "weights and optimizer" if key == "student" else "weights"
        yield Check("models", key, WARN, f"its {what} take {human_bytes(needed)}, and {device.type} has "
                    f"{human_bytes(memory)}", todo)  # fmt: skip


def _tokenizers(config: RunConfig, models: _Models, tokenizer: Any) -> Iterator[Check]:
    """Yields whether each model's tokenizer gives the corpus's ids, and its head has their rows."""
    from stages.tokenizer import require_same_tokenizer, vocab_size

    ids, agreed = vocab_size(tokenizer), True
    for key, facts in models.items():
        try:
            if facts.tokenizer is not None:
                require_same_tokenizer(tokenizer, facts.tokenizer, "the corpus", key)
        except ScholiastError as error:
            agreed = False
            yield failed("tokenizers", key, error)
        if facts.rows < ids:
            agreed = False
            yield Check("tokenizers", key, BAD, f"its head has {facts.rows:,} rows for {ids:,} ids",
                        "use the tokenizer this model was trained with")  # fmt: skip
    if agreed:
        padded = ", ".join(f"{key} {facts.rows:,}" for key, facts in models.items())
        yield Check(
            "tokenizers", "all models", OK, f"agree on {ids:,} ids (rows of heads: {padded})"
        )
    if config.corpus.append_eos and tokenizer.eos_token_id is None:
        yield Check("tokenizers", "corpus.tokenizer", BAD, "has no end-of-sequence token",
                    "set corpus.append_eos: false")  # fmt: skip


def _sources(config: RunConfig, tokenizer: Any) -> tuple[list[Found], list[Check]]:
    found, checks = [], []
    for i, source in enumerate(config.corpus.sources):
        key = f"corpus.sources.{i}"
        try:
            one, check = _source(source, key, tokenizer)
            found.append(one)
            checks.append(check)
        except ScholiastError as error:
            checks.append(failed("text", key, error))
    if not any(s.heldout or s.split == "heldout" for s in config.corpus.sources):
        todo = "set corpus.sources.N.heldout, or add a source with split: heldout"
        what = "nothing is held out: there will be no figures"
        checks.append(Check("text", "held out", WARN, what, todo))
    return found, checks


def _source(source: SourceOptions, key: str, tokenizer: Any) -> tuple[Found, Check]:
    found = look_at_source(source, key, source.messages_field or source.text_field)
    name = f"{source.domain} ({key})"
    if found.options.messages_field != source.messages_field:
        what = "the column holds chats, and the configuration says text"
        return found, Check("text", name, BAD, what, "set messages_field in place of text_field")
    if tokenizer is None:
        return found, Check("text", name, OK, f"{found.how_sure}{found.documents:,} documents")
    found = count_tokens(found, key, tokenizer)
    if found.whole and source.heldout:
        held, kept = sides(found, key, tokenizer)
        if not (held and kept):
            empty = "to train on" if held else "held out"
            return found, Check("text", name, BAD, f"holding out {source.heldout} leaves nothing {empty}",
                                "change heldout, or cut the texts with passage_chars")  # fmt: skip
    return found, Check("text", name, OK, f"{source.path}: {found.about}")


def _needed(config: RunConfig, tokens: int, student: ModelFacts | None) -> float:
    """Returns about how many bytes the whole run puts on disk."""
    store, kept = config.store, config.student.keep_layers
    entries = store.entries + store.drawn
    count = 0
    if student is not None:
        count = student.parameters_with(len(kept)) if kept is not None else student.parameters
    runs = 2 if config.train.baseline else 1
    notes = tokens * (4.0 + _ROW_BYTES * entries * len(config.teachers))
    return notes + runs * count * (12.0 * config.train.keep_checkpoints + 4.0)


def _folders(config: RunConfig, needed: float) -> Iterator[Check]:
    yield from folder(config.run, "run_dir", needed)
    for name, place in (("corpus_dir", config.corpus_dir), ("cache_dir", config.cache_dir)):
        root = config.corpus_folder if name == "corpus_dir" else config.cache_folder
        if place is None:
            continue
        if isinstance(root, RemotePath):
            yield _remote(root, name)
        else:
            yield from folder(Path(place), name, needed)


def _remote(root: RemotePath, name: str) -> Check:
    try:
        there = root.exists()
    except ScholiastError as error:
        return failed("folders", name, error)
    return Check("folders", name, OK if there else WARN, f"{root} {'is there' if there else 'is empty'}",
                 "" if there else "fill it with `scholiast push`")  # fmt: skip


def _loaded(config: RunConfig, models: _Models) -> Iterator[Check]:
    """Loads the models one by one and yields whether head and packing are as we take them."""
    from stages.device import choose_device
    from stages.head import Head
    from stages.model_checks import check_model
    from stages.student import build_student
    from stages.teacher import TransformersTeacher

    device = choose_device(config.device)
    told = "its head gives its own logits, and packed documents do not see each other"
    for key, facts in models.items():
        try:
            if key == "student":
                model = build_student(config.student, facts.folder, device, config.train.seed)
                check_model(model, Head.of(model, bfloat16=False), key, "student.attention")
                del model
            else:
                name = key.partition(".")[2]
                TransformersTeacher(name, facts.folder, config.teachers[name], device).close()
            yield Check("models", f"{key}, loaded", OK, told)
        except ScholiastError as error:
            yield failed("models", f"{key}, loaded", error)
        gc.collect()
