"""The parts of `init` and `doctor`: passages, YAML, sources, choices, checks."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_tokenizer, sentences
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import validated
from pipeline.start import checks, machine
from pipeline.start.choices import (
    Job,
    batches,
    block_length,
    compose,
    spread_layers,
    teacher_blocks,
)
from pipeline.start.heldout import hold_out, prepared
from pipeline.start.machine import Machine, Rates
from pipeline.start.models import ModelFacts, human_count
from pipeline.start.sources import Found, count_tokens, find, look_at, parse, sides
from pipeline.start.writing import render
from stages.documents import load_rows
from stages.layer_pairs import at_depth
from stages.model_files import locate, parameters_of, present
from stages.options import SourceOptions
from stages.passages import passages
from storage.errors import ConfigError, CorpusError, TeacherError

# -- passages


@given(st.text("ab \n\t漢", max_size=300), st.integers(2, 50))
def test_passages_are_the_text(text: str, length: int) -> None:
    pieces = list(passages(text, length))
    assert "".join(pieces) == text and all(0 < len(piece) <= length for piece in pieces)


def test_passages_end_where_paragraphs_do() -> None:
    text = "one two\n\nthree four\n\nfive"
    assert list(passages(text, 22)) == ["one two\n\nthree four\n\n", "five"]
    assert list(passages("a" * 10, 4)) == ["aaaa", "aaaa", "aa"]


# -- YAML

_KEYS = st.text("ab_1yes", min_size=1, max_size=4)
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20), st.lists(st.integers(), max_size=3),
    st.lists(st.dictionaries(_KEYS, st.text(max_size=8), min_size=1, max_size=2), max_size=2),
)  # fmt: skip


@given(
    st.dictionaries(_KEYS, st.one_of(_VALUES, st.dictionaries(_KEYS, _VALUES, min_size=1, max_size=3)),
                    min_size=1, max_size=4),
    st.data(),
)  # fmt: skip
def test_what_is_rendered_reads_back(config: dict[str, Any], data: st.DataObject) -> None:
    keys = [*config, *(f"{a}.{b}" for a, c in config.items() if isinstance(c, dict) for b in c)]
    comments = dict.fromkeys(data.draw(st.lists(st.sampled_from(keys))), "why: # 'so'")
    assert yaml.safe_load(render(config, comments, ["top: line", ""])) == config


def test_line_breaks_of_unicode_read_back() -> None:
    config = {"name": "a\x85b\u2028c\u2029", "corpus": {"sources": [{"path": "\x85"}]}}
    assert yaml.safe_load(render(config, {}, [])) == config


def test_comments_stand_beside_their_lines_or_above() -> None:
    config = {"name": "x", "corpus": {"sources": [{"path": "p" * 90}]}, "loss": {"alpha": 0.9}}
    comments = {"corpus.sources.0": "long line", "loss.alpha": "share", "gone": "?"}
    lines = render(config, comments, ["head"]).splitlines()
    assert lines[0] == "# head" and "gone" not in "".join(lines)
    assert lines.index("    # long line") == lines.index(f"    - {{path: {'p' * 90}}}") - 1
    assert next(line for line in lines if "alpha" in line).endswith("# share")


# -- sources


def rows_file(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_formats_are_told_by_suffix_and_folder(tmp_path: Path) -> None:
    jsonl = {"domain": "docs", "format": "jsonl", "path": "a/*.jsonl"}
    assert parse("docs=a/*.jsonl", "--source") == [jsonl]
    assert parse("a/docs.jsonl", "--source")[0] == jsonl | {"path": "a/docs.jsonl"}
    assert parse("book.txt", "--source") == [
        {"domain": "book", "format": "text", "path": "book.txt"}
    ]
    assert parse("x=data.parquet", "--source")[0]["format"] == "parquet"
    for name in ("a.md", "b.txt", "deep/c.txt", "d.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some text")
    found = find(f"notes={tmp_path}", "--source")
    assert [(one.options.path, one.documents) for one in found] == [
        (f"{tmp_path}/**/*.md", 1), (f"{tmp_path}/**/*.txt", 2)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="format of a source cannot be told"):
        parse("x=notes.docx", "--source")


@pytest.mark.parametrize(("text", "values"), [
    ("hub:org/set", {}),
    ("hub:org/set@abc", {"revision": "abc"}),
    ("hub:org/set:en", {"hub_config": "en"}),
    ("hub:org/set:en:test@v1/x", {"hub_config": "en", "hub_split": "test", "revision": "v1/x"}),
    ("hub:org/set::validation", {"hub_split": "validation"}),
    ("hub:org/set::train[:50]@abc", {"hub_split": "train[:50]", "revision": "abc"}),
    ("hub:org/set::@", {}),
])  # fmt: skip
def test_a_hub_data_set_has_configuration_split_and_revision(
    text: str, values: dict[str, str]
) -> None:
    known = {"format": "hub", "path": "org/set", **values}
    assert parse(text, "--source") == [{"domain": "set", **known}]
    assert parse(f"d={text}", "--heldout") == [{"domain": "d", **known}]


def hub_folder(folder: Path) -> Path:
    """A data set that the library takes by name, of two configurations without a split "train"."""
    for config, splits in (("en", ("test", "validation")), ("de", ("validation",))):
        (folder / config).mkdir(parents=True)
        for split in splits:
            rows_file(folder / config / f"{split}.jsonl", [{"text": f"{config} {split}"}] * 30)
    named = [
        f"- config_name: {config}\n  data_files:\n" + "".join(
            f"  - {{split: {split}, path: {config}/{split}.jsonl}}\n" for split in splits
        )
        for config, splits in (("en", ("test", "validation")), ("de", ("validation",)))
    ]  # fmt: skip
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(named)}---\n")
    return folder


@pytest.mark.parametrize(
    ("key", "told"),
    [("--source x", "--field x=COLUMN"), ("corpus.sources.3", "set corpus.sources.3.text_field")],
)
def test_a_column_is_named_where_the_source_was(tmp_path: Path, key: str, told: str) -> None:
    rows_file(tmp_path / "x.jsonl", [{"a": "text", "b": "more"}] * 3)
    source = SourceOptions(domain="x", format="jsonl", path=str(tmp_path / "x.jsonl"))
    with pytest.raises(ConfigError, match="cannot be told which column") as caught:
        look_at(source, key)
    assert told in caught.value.todo


def test_a_stream_that_does_not_tell_its_length_is_at_least_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    stream = datasets.Dataset.from_dict({"text": ["a text"] * 30}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    for rows, told in ((10, "at least 11 texts"), (29, "at least 30 texts"), (30, "30 texts")):
        monkeypatch.setattr("pipeline.start.sources.ROWS", rows)
        [found] = find("hub:org/set@main", "--source")
        least = "at least" if rows < 30 else "about"
        assert replace(found, tokens=9).about == f'{told} in "text", {least} 9 tokens'


def test_configurations_and_splits_of_a_hub_data_set(tmp_path: Path) -> None:
    name = hub_folder(tmp_path / "set")
    [found] = find(f"hub:{name}:en:test@main", "--source")
    assert found.sample == ["en test"] * 30 and found.options.hub_config == "en"
    assert load_rows(found.options, "a")[:]["text"] == found.sample, "the corpus takes the same"
    for rest, has, todo in (
        ("", "one of en, de", f"such as hub:{name}:en,"),
        (":fr", "one of en, de", "hub_config"),
        (":en", "one of test, validation", f"such as hub:{name}:en:test,"),
        (":de:test", "one of validation", "hub_split"),
    ):
        with pytest.raises(CorpusError, match="the data set has") as told:
            find(f"hub:{name}{rest}@main", "--source")
        assert told.value.expected == has and todo in told.value.todo, rest


def test_a_split_of_a_saved_data_set_is_named_by_its_folder(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"test": one}).save_to_disk(tmp_path / "saved")
    with pytest.raises(CorpusError, match="no such split") as told:
        find(f"{tmp_path}/saved", "--source")
    assert told.value.expected == "one of test" and f"{tmp_path}/saved/test" in told.value.todo
    assert find(f"{tmp_path}/saved/test", "--source")[0].sample == ["a", "b"]


def test_a_long_text_is_read_no_further_than_needed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beginning tells what there is about; a character that the limit cuts is left out."""
    whole = "\n\n".join(sentences(600, 5))
    file = long_file(tmp_path / "long.txt", whole)
    limit = whole.encode().index("漢".encode(), len(whole) // 2) + 1
    known = count_tokens(find(str(file), "--source")[0], "a", tokenizer)
    assert known.whole and known.times == 1.0 and known.sample == [whole]
    monkeypatch.setattr("pipeline.start.sources._BYTES", limit)
    file.write_bytes(file.read_bytes() + b"\xff")
    [cut] = find(str(file), "--source")
    long_file(file, whole)
    assert cut.sample == [whole[: len(cut.sample[0])]] and len(cut.sample[0].encode()) == limit - 1
    assert not cut.whole and cut.exact and cut.documents == 1
    cut = count_tokens(cut, "a", tokenizer)
    assert cut.tokens == pytest.approx(known.tokens, rel=0.1)
    assert cut.about.startswith("1 texts, about ")
    [(pieces, share)] = prepared([cut], tokenizer)
    there = len(load_rows(pieces.options, "a"))
    assert pieces.documents == pytest.approx(there, rel=0.2) and 0 < share < 1
    assert not pieces.exact and pieces.about.startswith("about ")
    assert pieces.tokens == pytest.approx(known.tokens, rel=0.1)
    (tmp_path / "short.txt").write_bytes(b"cut \xe6\xbc")
    with pytest.raises(CorpusError, match="UnicodeDecodeError"):
        find(f"{tmp_path}/short.txt", "--source")


def test_the_column_is_found_or_asked_for(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = find(rows_file(tmp_path / "c.jsonl", [{"id": "1", "messages": chat}]), "--source")[0]
    assert (chats.options.messages_field, chats.options.text_field) == ("messages", "text")
    body = find(rows_file(tmp_path / "b.jsonl", [{"n": 1, "body": "words"}]), "--source")[0]
    assert body.options.text_field == "body" and body.sample == ["words"]
    two = rows_file(tmp_path / "t.jsonl", [{"title": "a", "body": "b"}])
    with pytest.raises(ConfigError, match="which column") as told:
        find(f"t={two}", "--source")
    assert "title (text), body (text)" in str(told.value) and "--field t=COLUMN" in str(told.value)
    assert find(two, "--source", {"t": "body"})[0].options.text_field == "body"
    none = rows_file(tmp_path / "n.jsonl", [{"n": 1}])
    with pytest.raises(ConfigError, match="'n' holds neither"):
        find(none, "--source", {"n": "n"})
    with pytest.raises(ConfigError, match="no column holds text") as told:
        find(none, "--source")
    assert "--field" not in str(told.value), "no column that could be named would do"
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.txt").write_text("plain")
    rows_file(tmp_path / "mixed/b.jsonl", [{"title": "a", "body": "b"}])
    both = find(f"m={tmp_path}/mixed", "--source", {"m": "body"})
    assert [one.sample for one in both] == [["b"], ["plain"]]


def test_a_list_of_objects_and_parquet_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = sentences(700, 1)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        found = find(str(tmp_path / name), "--source")[0]
        assert (found.documents, found.whole, len(found.sample)) == (700, False, 500)
        assert found.sample == texts[:500]
    lines = find(rows_file(tmp_path / "b.jsonl", [{"text": t} for t in texts]), "--source")[0]
    assert not lines.whole and abs(lines.documents - 700) < 50, "estimated by size"


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.jsonl", b'{"text": "x"}\n{broken\n', "cannot be read"),
        ("a.jsonl", b'["x"]\n', "cannot be read"),
        ("a.jsonl", b"", "empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read: UnicodeDecodeError"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=what):
        find(str(tmp_path / name), "--source")
    with pytest.raises(CorpusError, match="no files"):
        find(str(tmp_path / "none.jsonl"), "--source")


def test_what_is_held_out_is_tried_on_the_documents(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": text} for text in sentences(40, 3)]
    found = count_tokens(find(rows_file(tmp_path / "a.jsonl", rows), "--source")[0], "a", tokenizer)
    share = hold_out(found, "a", tokenizer)
    assert share is not None and share >= 0.05
    cut = replace(found, options=found.options.model_copy(update={"heldout": share}))
    held, kept = sides(cut, "a", tokenizer)
    assert len(held) >= 2 and sum(held) + sum(kept) == found.tokens
    assert count_tokens(cut, "a", tokenizer).tokens == found.tokens
    giant = replace(found, sample=[" ".join(found.sample) * 9, *"abcdefghijklmnopqrstuvwxyz"])
    assert hold_out(giant, "a", tokenizer) is None, "on either side it is nearly all of it"
    one = replace(found, sample=found.sample[:1], documents=1)
    assert hold_out(one, "a", tokenizer) is None, "a document is held out whole"
    large = replace(found, whole=False, documents=100_000, tokens=80_000_000)
    assert hold_out(large, "a", tokenizer) == 0.01


def test_a_few_long_documents_are_cut(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [" ".join(sentences(80, seed)) for seed in (1, 2, 3)]
    few = find(rows_file(tmp_path / "few.jsonl", [{"text": text} for text in long]), "--source")[0]
    rows = [
        {"text": " ".join(sentences(400, 4))},
        *({"text": word} for word in "abcdefghijklmnopqrstuvwxyz"),
    ]
    uneven = find(rows_file(tmp_path / "uneven.jsonl", rows), "--source")[0]
    text = find(str(long_file(tmp_path / "long.txt", long[0])), "--source")[0]
    cases = ((few, long), (uneven, [r["text"] for r in rows]), (text, long[:1]))
    sources = prepared([found for found, _ in cases], tokenizer)
    for (found, share), (before, whole) in zip(sources, cases, strict=True):
        pieces = load_rows(found.options, "a")[:]["text"]
        assert "".join(pieces) == "".join(whole) and len(pieces) > len(whole)
        assert 0 < share < 1 and found.documents == len(pieces) and found.sample == pieces
        assert f"{len(pieces)} passages" in found.about
        assert found.options.path == before.options.path
        again = look_at(found.options, "a")
        assert count_tokens(again, "a", tokenizer) == found
    monkeypatch.setattr("pipeline.start.sources.ROWS", 20)
    many = find(str(long_file(tmp_path / "many.txt", "a word\n\n" * 5_000)), "--source")[0]
    [(found, _)] = prepared([many], tokenizer)
    assert found.documents == len(load_rows(found.options, "a")) > len(found.sample) == 20


def long_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_tokens_are_counted_as_the_corpus_counts(tmp_path: Path, tokenizer: Any) -> None:
    texts = sentences(10, 4)
    rows = [{"text": text} for text in texts]
    found = count_tokens(find(rows_file(tmp_path / "a.jsonl", rows), "--source")[0], "a", tokenizer)
    assert found.tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    chat = [{"role": "user", "content": "a"}]
    chats = find(rows_file(tmp_path / "c.jsonl", [{"messages": chat}]), "--source")[0]
    bare = make_tokenizer(tmp_path / "bare")
    bare.chat_template = None
    with pytest.raises(CorpusError, match="no chat template"):
        count_tokens(chats, "c", bare)


# -- choices

_LARGE = Machine("cuda", 80_000_000_000, 1, True, "a large GPU")
_SMALL = Machine("cpu", 8_000_000_000, 0, False, "a small computer")


def facts(parameters: int = 1_000_000_000, context: int = 8192, layers: int = 24) -> ModelFacts:
    return ModelFacts("org/m", Path("m"), True, "llama", layers, 2048, 8192, context, 49_152,
                      parameters, 100_000_000, object())  # fmt: skip


def job(tokens: int = 500_000_000, machine: Machine = _LARGE, **changes: Any) -> Job:
    source = SourceOptions(domain="d", format="jsonl", path="d.jsonl")
    found = Found(source, ["x"], False, 1000, tokens)
    whole = Job("n", "runs/n", "auto", {"a": facts(7_000_000_000)}, facts(), None, "org/m", 49_152,
                True, [(found, 0.01)], None, machine)  # fmt: skip
    return replace(whole, **changes)


def test_blocks_suit_contexts_text_and_machine() -> None:
    assert block_length(job()) == 2048
    assert block_length(job(machine=_SMALL)) == 512
    assert block_length(job(student=facts(context=1024))) == 1024
    assert block_length(job(tokens=20_000)) == 256, "a small corpus still makes blocks enough"
    assert block_length(job(block_length=4096)) == 4096
    with pytest.raises(ConfigError, match="longer than a model's context"):
        block_length(job(block_length=9000))


def test_batches_suit_the_memory() -> None:
    large = batches(job(), 2048, "bf16")
    assert large.blocks * large.accumulate * 2048 == 131_072 and not large.checkpointing
    assert large.needed < _LARGE.memory
    tight = batches(job(machine=replace(_LARGE, memory=24_000_000_000)), 2048, "bf16")
    assert tight.checkpointing and tight.needed < 24_000_000_000
    few = batches(job(tokens=20_000), 256, "bf16")
    assert few.blocks * few.accumulate <= 2, "so that there are steps to learn in"
    assert teacher_blocks(facts(7_000_000_000), job(), 2048, 2)[1] < _LARGE.memory


@pytest.mark.parametrize("machine", [_LARGE, _SMALL])
@pytest.mark.parametrize("tokens", [3_000, 5_000_000, 2_000_000_000])
def test_what_is_composed_is_a_configuration(machine: Machine, tokens: int) -> None:
    for changes in ({}, {"keep_layers": [0, 5, 23]}, {"ends": False}):
        config, comments = compose(job(tokens, machine, **changes))
        run = validated(yaml.safe_load(render(config, comments, ["x"])), Path("x"))
        assert run.train.precision == ("bf16" if machine.fast_bf16 else "fp32")
        assert run.teachers["a"].dtype == ("bfloat16" if machine.fast_bf16 else "float32")
        assert run.teachers["a"].feature_layers == (23,) and at_depth(23, 24, 3) == 3
        assert run.corpus.append_eos is changes.get("ends", True)
        blocks = math.ceil(0.99 * tokens / run.corpus.block_length)  # a hundredth is held out
        assert f"about {run.train.steps_over(blocks):,} steps" in comments["train.epochs"]
        assert run.evaluate.prompt_tokens + run.evaluate.new_tokens < run.corpus.block_length


def test_layers_are_spread() -> None:
    assert spread_layers(1, 5) == [0] and spread_layers(5, 5) == [0, 1, 2, 3, 4]
    assert spread_layers(4, 30) == [0, 10, 19, 29]
    with pytest.raises(ConfigError, match="so many layers"):
        spread_layers(6, 5)


def test_parameters_of_real_shapes() -> None:
    smol = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "vocab_size": 49_152,
            "num_key_value_heads": 3, "intermediate_size": 1536}  # fmt: skip
    assert abs(parameters_of(smol) / 134_515_008 - 1) < 0.001, "SmolLM2-135M's own count"
    qwen = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 152_064,
            "tie_word_embeddings": False}  # fmt: skip
    assert abs(parameters_of(qwen) / 7_615_616_512 - 1) < 0.001, "Qwen2.5-7B's own count"
    assert human_count(134_515_008) == "135 M" and human_count(7_615_616_512) == "7.62 B"


def test_a_model_is_here_when_all_its_shards_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, folder = "1" * 40, tmp_path / "models--org--m"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    (snapshot / "tokenizer.json").write_text("{}")
    assert present("org/m", None, weights=False) and not present("org/m", None)
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").write_bytes(b"")
    assert not present("org/m", None)
    (snapshot / "model-2.safetensors").write_bytes(b"")
    assert present("org/m", None)


@pytest.mark.parametrize(("named", "told"), [
    ("models/techer", "did you mean models/teacher?"),
    ("./models/techer", "did you mean ./models/teacher?"),
    ("models/techer/", "did you mean models/teacher?"),
    ("models/quite-other", "did you mean models/small or models/teacher?"),
    ("teacher", "give a folder that holds config.json"),
    ("nowhere/at/all", "there is no nowhere/at either, only .: give a folder"),
    ("~/models/techer", "did you mean ~/models/teacher?"),
    ("~/models/teacher", "write it out, since ~ is the shell's to expand: "),
    ("https://huggingface.co/org/m", "give a hub model's name alone: org/model"),
])  # fmt: skip
def test_a_mistyped_folder_is_not_asked_of_the_hub(
    named: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "small"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    (tmp_path / "models/techers").mkdir()  # no model
    with pytest.raises(TeacherError, match="no such model folder") as raised:
        locate(named, None, "--teacher x")
    assert told in raised.value.todo and raised.value.found == named
    hub = f"run `hf download {named}` first"
    assert (hub in raised.value.todo) == (named in ("models/techer", "models/quite-other"))


def test_a_hub_name_is_one_though_a_folder_is_called_like_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "found")
    monkeypatch.chdir(tmp_path)
    assert locate("org/m", None, "k") == Path("found")
    (tmp_path / "org").mkdir()
    with pytest.raises(TeacherError, match="no such model folder"):
        locate("org/m", None, "k")
    (tmp_path / "hub/models--org--m").mkdir(parents=True)
    assert locate("org/m", None, "k") == Path("found")


# -- checks


def test_versions_are_held_against_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {check.name: check for check in checks.versions()}
    assert {"python", "torch", "transformers", "zarr", "pcodec"} <= set(found)
    assert all(check.state == checks.OK for check in found.values())
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda name: ["zarr>=99", "nowhere>=1", "s<1; extra == 'x'"]
    )
    found = {check.name: check for check in checks.versions()}
    assert found["zarr"].state == checks.BAD and "pip install 'zarr>=99'" in found["zarr"].todo
    assert "not installed" in found["nowhere"].found and "s" not in found


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    found = checks.folder(tmp_path / "not/yet", "run_dir")
    assert [check.state for check in found] == [checks.OK] * 3 and not list(tmp_path.iterdir())
    assert checks.folder(tmp_path, "run_dir", 1e18)[0].state == checks.WARN


def test_what_a_folder_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)  # as on a file system that only pretends
    assert checks.folder(tmp_path, "d")[2].found == "two at once get one lock"

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    assert checks.folder(tmp_path, "d")[2].state == checks.WARN

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("storage.durable.write_bytes", refuse)
    assert checks.folder(tmp_path, "d")[1].state == checks.BAD
    monkeypatch.setattr("tempfile.mkdtemp", none)
    assert "cannot be written" in checks.folder(tmp_path, "d")[0].found


def test_slow_bf16_and_few_open_files_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure", lambda _: Rates(1e9, 4e9, 64, "cpu", 2))
    found = {check.name: check for check in checks.devices()}
    assert found["bf16"].state == checks.WARN and "fp32" in found["bf16"].todo
    assert (
        "4.0 times slower than fp32" in found["bf16"].found and "2 threads" in found["bf16"].found
    )
    assert (
        found["processor"].state == checks.OK and str(machine.cores()) in found["processor"].found
    )
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 4096))
    assert checks.limits()[0].state == checks.WARN


def test_gpus_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    old = machine.Gpu("Old", 16_000_000_000, 15_000_000_000, "7.5", False)
    monkeypatch.setattr(machine, "gpus", lambda: [old, replace(old, name="New", bf16=True)])
    monkeypatch.setattr(machine, "measure", lambda _: Rates(4e9, 1e9, 64, "cpu", 1))
    found = {check.name: check for check in checks.devices()}
    assert found["GPU 0"].state == checks.WARN and "compute capability 7.5" in found["GPU 0"].found
    assert found["GPU 1"].state == checks.OK


def test_memory_is_that_of_the_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    assert machine.memory_bytes() == machine.available_bytes() == 1_000_000
    limit.write_text("max\n")
    assert machine.memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_measured_rates_say_how() -> None:
    rates = machine.measure("cpu")
    assert rates.bf16 > 0 and rates.fp32 > 0 and "1024² matrices" in rates.method
