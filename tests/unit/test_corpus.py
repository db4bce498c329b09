"""Stage zero: nothing dropped, boundaries kept, offsets true, every form of source, resumable."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHAT_TEMPLATE, Lab, sentences
from pydantic import ValidationError

from stages.corpus import prepare
from stages.documents import byte_offsets, is_heldout, source_identity
from stages.options import CorpusOptions, SourceOptions
from stages.passages import Passages, passages
from stages.progress import Silent
from storage import durable
from storage.blocks import BlockReader
from storage.corpus_info import CorpusInfo, SourceRange, load_info
from storage.errors import CorpusError, CorruptShard, StaleCache
from storage.fingerprint import HashMemo
from storage.types import TokenBlocks

LENGTH = 16


def options(lab: Lab, *sources: dict[str, Any], **changes: Any) -> CorpusOptions:
    given = sources or ({"domain": "x", "format": "jsonl", "path": str(lab.root / "x.jsonl")},)
    base = {"tokenizer": str(lab.root / "a"), "block_length": LENGTH, "blocks_per_part": 3}
    return CorpusOptions(**{**base, **changes}, sources=tuple(SourceOptions(**s) for s in given))


def read_all(lab: Lab, chosen: CorpusOptions, name: str = "corpus") -> TokenBlocks:
    root = lab.root / name
    info = prepare(chosen, root, HashMemo(lab.root / "memo.json"), Silent())
    return BlockReader(root).read(np.arange(info.blocks))


def texts_of(lab: Lab, name: str = "x") -> list[str]:
    lines = (lab.root / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def expected_tokens(lab: Lab, texts: list[str]) -> tuple[list[int], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab.root / "a")
    tokens, document = [], []
    for number, text in enumerate(texts):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        tokens += ids
        document += [number] * len(ids)
    return tokens, document


def test_no_token_is_dropped(lab: Lab) -> None:
    blocks = read_all(lab, options(lab))
    tokens, document = expected_tokens(lab, texts_of(lab))
    present = blocks.present
    assert blocks.inputs[present].tolist() == tokens
    assert blocks.document[:, :-1][present].tolist() == document


def test_every_token_but_a_documents_first_is_a_target_once(lab: Lab) -> None:
    """The look-ahead keeps the prediction across the seam of two blocks."""
    blocks = read_all(lab, options(lab))
    texts = texts_of(lab)
    tokens, document = expected_tokens(lab, texts)
    targets = [
        t for t, d, before in zip(tokens[1:], document[1:], document, strict=False) if d == before
    ]
    assert blocks.gold[blocks.scored].tolist() == targets
    assert int(blocks.scored.sum()) == len(tokens) - len(texts)


def test_positions_restart_with_each_document_and_block(lab: Lab) -> None:
    blocks = read_all(lab, options(lab))
    for row in range(len(blocks.block_ids)):
        expected, last = [], None
        for number in blocks.document[row, :-1].tolist():
            expected.append(0 if number != last else expected[-1] + 1)
            last = number
        assert blocks.positions[row].tolist() == expected


def test_byte_offsets_point_into_the_utf8_text(lab: Lab) -> None:
    """Every token's bytes lie between its offset and the next one; multi-byte text included."""
    blocks = read_all(lab, options(lab))
    texts = [text.encode() for text in texts_of(lab)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab.root / "a")
    checked = 0
    for token, number, offset in zip(
        blocks.inputs[blocks.present], blocks.document[:, :-1][blocks.present],
        blocks.offset[:, :-1][blocks.present], strict=True,
    ):  # fmt: skip
        piece = tokenizer.decode([token])
        if token == tokenizer.eos_token_id:
            assert offset == len(texts[number])
        elif "�" not in piece:  # a whole number of characters
            assert texts[number][offset:].startswith(piece.encode())
            checked += 1
    assert checked > 300


def test_byte_offsets_of_every_width() -> None:
    text = "aé漢🍵z"
    assert byte_offsets(text, np.arange(5)).tolist() == [0, 1, 3, 6, 10]
    assert byte_offsets("abc", np.array([0, 2])).tolist() == [0, 2]


def test_blocks_do_not_mix_sources_and_splits(lab: Lab) -> None:
    chosen = options(
        lab,
        {"domain": "x", "format": "jsonl", "path": str(lab.root / "x.jsonl"), "heldout": 0.3},
        {"domain": "y", "format": "jsonl", "path": str(lab.root / "y.jsonl")},
    )
    blocks = read_all(lab, chosen)
    info = load_info(lab.root / "corpus")
    assert info is not None
    assert [(s.domain, s.split) for s in info.sources] == [
        ("x", "train"),
        ("x", "heldout"),
        ("y", "train"),
    ]
    heldout = {i for i, text in enumerate(texts_of(lab)) if is_heldout(text, 0.3)}
    assert 0 < len(heldout) < 30
    for split, wanted in (("heldout", heldout), ("train", set(range(30)) - heldout)):
        rows = blocks.document[info.block_ids(split, "x"), :-1]
        assert set(rows[rows >= 0].tolist()) == wanted
    y = blocks.document[info.block_ids("train", "y"), :-1]
    assert set(y[y >= 0].tolist()) == set(range(30, 60))
    assert info.domain_of(info.block_ids("train", "y")).tolist() == [1] * len(y)


def test_the_domain_of_a_block_does_not_take_longer_with_more_sources() -> None:
    """It is asked for each batch; a corpus may have 10^5 sources."""
    count = 4000
    sources = tuple(SourceRange(f"d{i % 3000}", "train", 2 * i, 2, 1, 1) for i in range(count))
    info = CorpusInfo({}, "", "", 10, 4, 2 * count, 2, sources, ())
    began = time.process_time()
    for _ in range(50):
        assert info.domain_of(np.array([0, 5999, 6001, 7999])).tolist() == [0, 2999, 0, 999]
    assert time.process_time() - began < 2


def test_all_forms_of_a_source_give_the_same_blocks(lab: Lab) -> None:
    import datasets

    texts = texts_of(lab)
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.to_parquet(str(lab.root / "x.parquet"))
    rows.save_to_disk(str(lab.root / "disk"))
    (lab.root / "plain").mkdir()
    for i, text in enumerate(texts):
        (lab.root / "plain" / f"{i:03d}.txt").write_text(text)
    reference = read_all(lab, options(lab))
    forms = {"parquet": "x.parquet", "disk": "disk", "text": "plain/*.txt"}
    for form, path in forms.items():
        source = {"domain": "x", "format": form, "path": str(lab.root / path)}
        blocks = read_all(lab, options(lab, source), f"corpus-{form}")
        for name in ("tokens", "document", "offset", "loss_mask"):
            assert np.array_equal(getattr(blocks, name), getattr(reference, name)), (form, name)


def test_chat_targets_are_the_assistants_tokens(lab: Lab) -> None:
    from transformers import AutoTokenizer

    chat = [
        {"role": "user", "content": "the quick?"},
        {"role": "assistant", "content": "brown fox 🍵"},
        {"role": "user", "content": "jumps"},
        {"role": "assistant", "content": "over a lazy dog"},
    ]
    (lab.root / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    source = {
        "domain": "c", "format": "jsonl", "path": str(lab.root / "chat.jsonl"),
        "messages_field": "messages",
    }  # fmt: skip
    blocks = read_all(lab, options(lab, source, block_length=256))
    tokenizer = AutoTokenizer.from_pretrained(lab.root / "a")
    targets = tokenizer.decode(blocks.gold[blocks.scored].tolist())
    assert targets == "brown fox 🍵<|end|>over a lazy dog<|end|>"
    whole = tokenizer.decode(blocks.inputs[blocks.present].tolist())
    assert whole == tokenizer.apply_chat_template(chat, tokenize=False)


def test_chat_template_that_rewrites_turns_is_refused(lab: Lab) -> None:
    template = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else '-' }}")
    (lab.root / "a" / "chat_template.jinja").write_text(template)
    chat = [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]
    (lab.root / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    source = {
        "domain": "c", "format": "jsonl", "path": str(lab.root / "chat.jsonl"),
        "messages_field": "messages",
    }  # fmt: skip
    with pytest.raises(CorpusError, match="rewrites earlier turns"):
        read_all(lab, options(lab, source))


class Kill(Exception):
    pass


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_interrupted_preparation_goes_on_and_ends_the_same(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    chosen = options(
        lab,
        {"domain": "x", "format": "jsonl", "path": str(lab.root / "x.jsonl"), "heldout": 0.2},
        {"domain": "y", "format": "jsonl", "path": str(lab.root / "y.jsonl")},
    )
    whole = read_all(lab, chosen, "undisturbed")
    import stages.packing

    written, real = [], stages.packing.write_part

    def dies(*args: Any) -> None:
        if len(written) == parts:
            raise Kill
        written.append(1)
        real(*args)

    monkeypatch.setattr(stages.packing, "write_part", dies)
    with pytest.raises(Kill):
        read_all(lab, chosen)
    assert load_info(lab.root / "corpus") is None
    monkeypatch.setattr(stages.packing, "write_part", real)
    again = read_all(lab, chosen)
    for name in ("tokens", "document", "offset", "loss_mask"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    assert load_info(lab.root / "corpus") == load_info(lab.root / "undisturbed")


def test_changed_sources_are_refused_and_nothing_is_touched(lab: Lab) -> None:
    read_all(lab, options(lab))
    before = (lab.root / "corpus/corpus.json").read_bytes()
    with (lab.root / "x.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(StaleCache, match=r"sources\.000\.files"):
        read_all(lab, options(lab))
    assert (lab.root / "corpus/corpus.json").read_bytes() == before


def test_flipped_byte_is_refused(lab: Lab) -> None:
    read_all(lab, options(lab))
    path = lab.root / "corpus/blocks/000001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match=r"000001\.arrow"):
        BlockReader(lab.root / "corpus").read([4])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "cannot be read|no tokens"),
        ('{"text": ""}\n', "no tokens"),
        ('{"other": "a"}\n', "no such column"),
        ('{"text": 3}\n', "not text"),
        ('{"text": "a"\n', "cannot be read"),
    ],
)
def test_unusable_corpora_are_refused(lab: Lab, content: str, match: str) -> None:
    (lab.root / "bad.jsonl").write_text(content)
    source = {"domain": "x", "format": "jsonl", "path": str(lab.root / "bad.jsonl")}
    with pytest.raises(CorpusError, match=match):
        read_all(lab, options(lab, source))


def test_text_that_is_not_utf8_is_refused(lab: Lab) -> None:
    (lab.root / "bad.txt").write_bytes(b"caf\xe9")
    source = {"domain": "x", "format": "text", "path": str(lab.root / "bad.txt")}
    with pytest.raises(CorpusError, match="UnicodeDecodeError"):
        read_all(lab, options(lab, source))


def test_one_token_corpus(lab: Lab) -> None:
    (lab.root / "one.jsonl").write_text('{"text": "t"}\n')
    source = {"domain": "x", "format": "jsonl", "path": str(lab.root / "one.jsonl")}
    blocks = read_all(lab, options(lab, source, append_eos=False))
    assert blocks.present.sum() == 1 and not blocks.scored.any()


@pytest.mark.parametrize("form", ["text", "jsonl", "parquet", "disk"])
def test_a_corpus_of_passages_is_that_of_rows_of_passages(lab: Lab, form: str) -> None:
    """Tokens, documents and offsets; nothing of the text is lost at the cuts."""
    texts = ["\n\n".join(sentences(9, seed)) for seed in (1, 2)] + ["", "short"]
    rows = [{"text": text} for text in texts]
    path = lab.root / f"whole.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        texts = texts if form == "jsonl" else texts[:1]
        path.write_text(texts[0] if form == "text" else "\n".join(map(json.dumps, rows)))
    source = {"domain": "x", "format": form, "path": str(path), "heldout": 0.3}
    cut = options(lab, {**source, "passage_chars": 60})
    mine = read_all(lab, cut)
    assert np.array_equal(read_all(lab, cut).tokens, mine.tokens), "reading changes no source"
    pieces = [piece for text in texts for piece in passages(text, 60)]
    assert "".join(pieces) == "".join(texts) and len(pieces) > 8
    (lab.root / "pieces.jsonl").write_text("\n".join(json.dumps({"text": p}) for p in pieces))
    rows_of = {**source, "format": "jsonl", "path": str(lab.root / "pieces.jsonl")}
    theirs = read_all(lab, options(lab, rows_of), "theirs")
    for name in ("tokens", "document", "offset", "loss_mask"):
        assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name


def test_what_cannot_be_cut_is_refused_as_ever(lab: Lab) -> None:
    lines = [json.dumps({"text": text}) for text in ("a word " * 99, None)]
    (lab.root / "nothing.jsonl").write_text("\n".join(lines))
    source = {"domain": "x", "format": "jsonl", "path": str(lab.root / "nothing.jsonl")}
    with pytest.raises(CorpusError, match=r"a row is NoneType, not text\n.*nothing.jsonl, row 1\n"):
        read_all(lab, options(lab, {**source, "passage_chars": 60}))
    with pytest.raises(ValidationError, match="names chats"):
        SourceOptions(**source, passage_chars=60, messages_field="chat")


def test_corpora_without_passages_stay_what_they_were(lab: Lab) -> None:
    memo, path = HashMemo(lab.root / "memo.json"), str(lab.root / "x.jsonl")
    whole = source_identity(SourceOptions(domain="x", format="jsonl", path=path), "s", memo)
    cut = SourceOptions(domain="x", format="jsonl", path=path, passage_chars=9)
    assert "passage_chars" not in whole
    assert source_identity(cut, "s", memo) == {**whole, "passage_chars": 9, "passages": 1}


def test_what_others_leave_beside_a_data_set_is_no_text_of_it(lab: Lab) -> None:
    folder = lab.root / "disk"
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(folder)
    source, memo = (
        SourceOptions(domain="x", format="disk", path=str(folder)),
        HashMemo(lab.root / "m"),
    )
    before = source_identity(source, "s", memo)
    datasets.load_from_disk(str(folder)).map(lambda row: {"text": row["text"] * 2})
    assert list(folder.glob("cache-*.arrow")) and source_identity(source, "s", memo) == before


def test_a_long_text_is_read_once_for_its_passages() -> None:
    class Rows(list[dict[str, str]]):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            self.read += 1
            return super().__getitem__(index)

    rows = Rows([{"text": "a word " * 1000}, {"text": "b " * 50}])
    found = Passages(rows, "text", 20, lambda row, what: ValueError(what))
    rows.read = 0
    pieces = [piece for i in range(0, len(found), 16) for piece in found[i : i + 16]["text"]]
    assert "".join(pieces) == "a word " * 1000 + "b " * 50 and rows.read == 2


def test_hub_source_needs_a_revision() -> None:
    with pytest.raises(ValidationError, match="revision"):
        SourceOptions(domain="x", format="hub", path="org/data")


def test_sentences_are_multibyte() -> None:
    assert not all(text.isascii() for text in sentences(5, 1))


def test_memo_sees_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    memo = HashMemo(tmp_path / "memo.json")
    path.write_text("one")
    first = memo.sha256(path)
    path.write_text("other")
    assert memo.sha256(path) != first
    assert HashMemo(tmp_path / "memo.json").sha256(path) == memo.sha256(path)


def test_a_corpus_of_many_files_is_hashed_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memo is written now and then, and at the end; not for each file."""
    written, write = list[int](), durable.write_bytes

    def seen(path: Path, data: bytes) -> None:
        written.append(len(data))
        write(path, data)

    monkeypatch.setattr(durable, "write_bytes", seen)
    for i in range(500):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    source = SourceOptions(domain="x", format="text", path=str(tmp_path / "*.txt"))
    memo, began = HashMemo(tmp_path / "memo.json"), time.monotonic()
    hashes = source_identity(source, "corpus.sources.0", memo)["files"]
    assert len(written) <= 2 + time.monotonic() - began
    memo.save()
    memo.save()
    assert len(written) <= 3 + time.monotonic() - began
    monkeypatch.setattr("storage.fingerprint.file_sha256", None)  # nothing is hashed again
    again = source_identity(source, "corpus.sources.0", HashMemo(tmp_path / "memo.json"))
    assert again["files"] == hashes and len(set(hashes)) == 500
