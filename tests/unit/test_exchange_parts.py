"""The pieces of import and export: decoding, checking, bounds."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from capture_files import pack_bits
from hypothesis import given
from hypothesis import strategies as st

from pipeline.exchange import topk_jsonl
from pipeline.exchange.captured import CapturedSequence, Reading
from pipeline.exchange.checks import ShiftCheck, Tolerance, clean
from pipeline.exchange.distillkit import (
    PackedLayout,
    decode_logprobs,
    read_distillkit,
    unpack_bits,
)
from pipeline.exchange.head_statistics import head_statistics
from pipeline.exchange.scratch import FACTS, TYPES, Scratch, ScratchWriter
from pipeline.exchange.topk_jsonl import parse_entries, read_topk
from pipeline.yaml_text import LARGEST
from storage import durable
from storage.codec import from_bfloat16, to_bfloat16
from storage.errors import ConfigError, CorruptShard, ScholiastError, VocabularyMismatch

V = 20


def sequence(
    *entries: dict[int, float], tokens: tuple[int, ...] = (1, 2, 3, 4)
) -> CapturedSequence:
    ids = [i for entry in entries for i in entry]
    values = [v for entry in entries for v in entry.values()]
    counts = np.array([len(entry) for entry in entries])
    return CapturedSequence(
        "a.jsonl, line 1", np.array(tokens, np.int32), 1, counts, np.array(ids, np.int32),
        np.array(values, np.float32),
    )  # fmt: skip


@given(st.integers(1, 24), st.integers(1, 9), st.randoms())
def test_bits_are_unpacked_as_they_were_packed(bits: int, count: int, random: Any) -> None:
    values = np.array([[random.getrandbits(bits) for _ in range(count)] for _ in range(3)])
    packed = pack_bits(values, bits)
    assert packed.shape == (3, math.ceil(bits * count / 8))
    assert (unpack_bits(packed, bits, count) == values).all()


def test_ids_of_a_hand_packed_byte_string() -> None:
    packed = np.array([[0b10100000, 0b11000111]], np.uint8)  # 10100 00011 00011, and padding
    assert unpack_bits(packed, 5, 3).tolist() == [[0b10100, 0b00011, 0b00011]]


def test_distillkits_example_layout_decodes_to_what_its_formulas_say() -> None:
    """Exact bfloat16 values, a polynomial with a root, two bins of other widths, no deltas."""
    layout = PackedLayout.model_validate({
        "d": 128_256, "k": 12, "exact_k": 4, "exact_dtype": "bfloat16", "delta_encoding": False,
        "polynomial_terms": [0, 1, 2, "sqrt"], "term_dtype": "float32",
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 3, "num_elements": 5},
            {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
        ],
    })  # fmt: skip
    exact = from_bfloat16(to_bfloat16(np.array([-0.5, -1.25, -2.1, -3.0], np.float32)))
    coefficients = np.array([-3.5, -0.25, 0.01, -0.3], "<f4")
    codes, signs = np.array([[0, 7, 4, 3, 5]]), np.array([[1, 0]])
    packed = np.concatenate([
        to_bfloat16(exact).astype("<u2").view(np.uint8), coefficients.view(np.uint8),
        np.array([0.5], "<f2").view(np.uint8), pack_bits(codes, 3)[0],
        np.array([0.125], "<f4").view(np.uint8), pack_bits(signs, 1)[0],
    ])  # fmt: skip
    assert len(packed) == layout.logprob_bytes and layout.id_bytes == math.ceil(12 * 17 / 8)
    t = np.arange(8)
    rest = -3.5 - 0.25 * t + 0.01 * t**2 - 0.3 * np.sqrt(t)
    rest[:5] += (codes[0] - 4) * 0.5
    rest[5:7] += np.array([1, -1]) * 0.125
    found = decode_logprobs(packed[None], layout)[0]
    assert np.allclose(found, [*exact, *rest], atol=1e-6)
    delta = layout.model_copy(update={"delta_encoding": True})
    assert np.allclose(
        decode_logprobs(packed[None], delta)[0], np.cumsum([*exact, *rest]), atol=1e-5
    )


def test_bins_undo_the_rounding_of_a_polynomial_in_bfloat16() -> None:
    """As DistillKit writes it: what the elements hold is left by the polynomial as bfloat16 sums it."""
    layout = PackedLayout.model_validate({
        "d": 500, "k": 20, "exact_k": 0, "delta_encoding": False, "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "bfloat16", "normalize_t": True,
        "residual_bins": [{"scale_dtype": "float32", "element_bits": 12, "num_elements": 20}],
    })  # fmt: skip
    wanted = -torch.sort(torch.rand(7, 20, generator=torch.Generator().manual_seed(1)) * 9)[0]
    t = torch.linspace(0, 1, 20)
    table = torch.stack([t**0, t, t.sqrt()], -1)
    fitted = torch.linalg.lstsq(table.expand(7, -1, -1), wanted[..., None]).solution[..., 0]
    terms = fitted.bfloat16()
    rest = wanted - (table.bfloat16() * terms[:, None]).sum(-1).float()
    scale = rest.abs().amax(-1, keepdim=True) / 2048
    codes = ((rest / scale).round().clamp(-2048, 2047) + 2048).long().numpy()
    packed = np.concatenate(
        [terms.view(torch.uint8).numpy(), scale.view(torch.uint8).numpy(), pack_bits(codes, 12)], 1
    )
    found = decode_logprobs(packed, layout)
    assert (np.abs(found - wanted.numpy()) <= 1.01 * scale.numpy()).all()


PACKED = {"d": 16, "k": 2, "exact_k": 2, "exact_dtype": "float32", "delta_encoding": False}
LOGPROBS = np.array([[-0.25, -2.0], [-0.5, -1.0]], "<f4").view(np.uint8).tolist()
INDICES = [[0x35], [0x72]]


def packed(root: Path, kind: pa.DataType, logprobs: Any = LOGPROBS, indices: Any = INDICES) -> Path:
    """Writes a capture of one sequence, its ids as bytes and its logprobs as `kind`."""
    (root / "layout.yaml").write_text(json.dumps(PACKED))
    columns = {
        "input_ids": pa.array([[1, 2, 3]]), "compressed_logprobs": pa.array([logprobs], kind),
        "bytepacked_indices": pa.array([indices], pa.list_(pa.list_(pa.uint8()))),
    }  # fmt: skip
    pq.write_table(pa.table(columns), root / "a.parquet")
    return root / "a.parquet"


def captured(path: Path) -> CapturedSequence:
    layout = path.parent / "layout.yaml"
    (one,) = read_distillkit([path], reading(format="distillkit", layout=layout))
    return one


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.list_(pa.uint8())), pa.list_(pa.list_(pa.int16())),
     pa.large_list(pa.large_list(pa.uint64()))],
    ids=str,
)  # fmt: skip
def test_lists_of_integers_of_any_width_are_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    one = captured(packed(tmp_path, kind))
    assert one.ids.tolist() == [3, 5, 7, 2] and one.logprobs.tolist() == [-0.25, -2.0, -0.5, -1.0]


@pytest.mark.parametrize(
    ("kind", "logprobs", "what"),
    [
        (pa.list_(pa.binary()), [bytes(row) for row in LOGPROBS], "no list of byte strings"),
        (pa.list_(pa.list_(pa.uint8(), 8)), LOGPROBS, "no list of byte strings"),
        (pa.list_(pa.uint8()), LOGPROBS[0], "no list of byte strings"),
        (pa.list_(pa.list_(pa.float32())), LOGPROBS, "no list of byte strings"),
        (pa.list_(pa.list_(pa.int16())), [LOGPROBS[0], [*LOGPROBS[1][:7], 300]], "row 0"),
        (pa.list_(pa.list_(pa.int8())), [[-1] * 8, [1] * 8], "row 0"),
        (pa.list_(pa.list_(pa.uint8())), [LOGPROBS[0], [*LOGPROBS[1][:7], None]], "row 0"),
        (pa.list_(pa.list_(pa.uint8())), [LOGPROBS[0], None], "row 0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_holds_no_bytes_is_refused_with_its_place(
    tmp_path: Path, kind: pa.DataType, logprobs: Any, what: str
) -> None:
    with pytest.raises(CorruptShard, match="compressed_logprobs") as error:
        captured(packed(tmp_path, kind, logprobs))
    assert what in str(error.value) and "a.parquet" in error.value.where


@pytest.mark.parametrize(
    "text",
    [
        "k: 2024-02-30",
        "[" * 3000,
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n" for m, n in pairwise("abcdefghij")),
        "d: !!python/object:os.system 1",
        json.dumps({**PACKED, "d": 10**400}),
        json.dumps({**PACKED, "unknown": 1}),
        "\x00",
        json.dumps({**PACKED, "d": 1}),
        json.dumps({**PACKED, "k": 17}),
        json.dumps({**PACKED, "exact_k": 3}),
        json.dumps({**PACKED, "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 3, "num_elements": 1}]}),
        json.dumps({**PACKED, "exact_k": 1, "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 64, "num_elements": 1}]}),
        json.dumps({**PACKED, "exact_k": 1, "polynomial_terms": [10**400]}),
        json.dumps({**PACKED, "exact_k": 1, "polynomial_terms": [1] * 33}),
        json.dumps(PACKED) + " " * LARGEST,
    ],
    ids=["date", "deep", "aliases", "tag", "huge", "key", "control", "no bits", "more than d",
         "more exact", "more in bins", "wide", "power", "terms", "long"],
)  # fmt: skip
def test_a_layout_that_is_none_or_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    path = packed(tmp_path, pa.list_(pa.list_(pa.uint8())))
    (tmp_path / "layout.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not a compression configuration of DistillKit") as error:
        captured(path)
    assert error.value.where == str(tmp_path / "layout.yaml")


def test_sorting_keeps_candidates_with_their_entry() -> None:
    heads = clean(sequence({3: -2.0, 4: -0.5}, {7: -1.0, 1: -1.0, 2: -3.0}), V, Tolerance())
    assert heads.ids.tolist() == [4, 3, 1, 7, 2]
    assert heads.logprobs.tolist() == [-0.5, -2.0, -1.0, -1.0, -3.0]
    assert heads.mass == pytest.approx(2 * math.exp(-1) + math.exp(-3))


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (sequence({3: math.nan}), "NaN"),
        (sequence({3: -1.0}, {4: -math.inf}), "NaN or infinite"),
        (sequence({3: 0.7}), "positive"),
        (sequence({3: -0.1, 4: -0.2}), "exceed 1"),
        (sequence({25: -1.0}), "beyond the vocabulary"),
        (sequence({3: -1.0}, tokens=(1, 99)), "beyond the vocabulary"),
        (sequence(dict.fromkeys(range(21), -9.0)), "more candidates"),
    ],
)
def test_what_is_no_distribution_is_refused_with_its_place(
    bad: CapturedSequence, what: str
) -> None:
    with pytest.raises((CorruptShard, VocabularyMismatch), match=what) as error:
        clean(bad, V, Tolerance())
    assert "a.jsonl, line 1" in error.value.where


def test_an_id_twice_in_an_entry_is_refused_and_in_two_entries_is_not() -> None:
    clean(sequence({3: -1.0}, {3: -1.0}), V, Tolerance())
    twice = sequence({3: -1.0, 4: -2.0})
    with pytest.raises(CorruptShard, match="twice"):
        clean(
            CapturedSequence(twice.where, twice.tokens, 1, twice.counts, np.array([3, 3], np.int32),
                             twice.logprobs), V, Tolerance(),
        )  # fmt: skip


def test_rounding_above_zero_is_zero_within_the_tolerance() -> None:
    heads = clean(sequence({3: 0.0004}), V, Tolerance())
    assert heads.logprobs.tolist() == [0.0]


def told(entropy: list[float], gold: list[float]) -> CapturedSequence:
    return replace(
        sequence(*({3: -1.0} for _ in entropy)), entropy=np.array(entropy, np.float32),
        gold=np.array(gold, np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("entropy", "gold", "what"),
    [
        (-3.5, -1.0, "an entropy is negative"),
        (math.inf, -1.0, "above that of even odds"),
        (math.log(V) + 0.02, -1.0, "above that of even odds"),
        (1.0, 2.0, "actual token's logprob is infinite or positive"),
        (1.0, math.inf, "infinite"),
        (1.0, -math.inf, "infinite"),
    ],
)
def test_statistics_that_no_distribution_has_are_refused_with_their_place(
    entropy: float, gold: float, what: str
) -> None:
    with pytest.raises(CorruptShard, match=what) as error:
        clean(told([1.0, entropy], [-1.0, gold]), V, Tolerance())
    assert error.value.where == "a.jsonl, line 1, entry 1"


def test_rounded_statistics_become_what_they_can_be_and_unknown_ones_stay_so() -> None:
    heads = clean(
        told([-0.001, math.log(V) + 0.001, math.nan], [0.0004, math.nan, -2.0]), V, Tolerance()
    )
    assert heads.entropy.tolist()[:2] == [0.0, pytest.approx(math.log(V), abs=1e-6)]
    assert heads.gold.tolist()[::2] == [0.0, -2.0]
    assert np.isnan(heads.entropy[2]) and np.isnan(heads.gold[1])
    unknown = clean(sequence({3: -1.0}), V, Tolerance())
    assert np.isnan(unknown.entropy).all() and unknown.gold.shape == (1,)


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.1, 6))
def test_no_distribution_with_this_head_has_less_entropy(seed: int, k: int, spread: float) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, 30)
    p = np.sort(np.exp(logits) / np.exp(logits).sum())[::-1]
    log_tail, bound = head_statistics(np.log(p[None, :k]).astype(np.float32), 30)
    assert math.exp(log_tail[0]) == pytest.approx(p[k:].sum(), abs=1e-6)
    assert bound[0] <= -(p * np.log(p)).sum() + 1e-4


def test_the_least_entropy_is_reached_by_the_most_uneven_tail() -> None:
    p = np.array([0.5, 0.2, 0.2, 0.1])  # the tail of the first two: one more of 0.2, and 0.1
    _, bound = head_statistics(np.log(p[None, :2]).astype(np.float32), 30)
    assert bound[0] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
    whole = np.full((1, 4), math.log(0.25), np.float32)
    log_tail, bound = head_statistics(whole, 4)
    assert log_tail[0] == -1e4 and bound[0] == pytest.approx(math.log(4), abs=1e-6)


def test_one_entry_is_too_little_to_contradict_a_shift() -> None:
    check = ShiftCheck(V)
    one = sequence({3: -0.1}, tokens=(1, 2, 3))
    check.add(one, clean(one, V, Tolerance()))
    check.require(1)
    assert check.rows == 1


def reading(**changes: Any) -> Reading:
    usual: dict[str, Any] = {
        "format": "topk-jsonl", "offset": 1, "values": "logprobs", "keys": "ids", "layout": None,
        "tokens": None, "vocabulary": {"a": 5, "b": 6}, "encode": lambda text: [len(text)] * 3,
    }  # fmt: skip
    return Reading(**{**usual, **changes})


def lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


def test_json_lines_of_every_shape_are_read(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"input_ids": [1, 2, 3], "logprobs": [{"2": -0.1, "4": -3}, None], "start": 1},
        "",
        {
            "text": "four",
            "logprobs": [[{"token_id": 4, "logprob": -0.5}, {"id": 5, "logprob": -2}]],
        },
        {"input_ids": [7, 8], "logprobs": [{"3": -0.5}], "gold_logprobs": [-2.0], "entropy": [1.5]},
        {
            "input_ids": [7, 8],
            "logprobs": [{"3": -0.5}] * 2,
            "gold_logprobs": [None, -(10**400)],
            "entropy": [math.inf, -1e39],
        },
    )
    first, second, third, fourth = read_topk([path], reading())
    assert (first.first, first.counts.tolist(), first.ids.tolist()) == (2, [2, 0], [2, 4])
    assert (second.tokens.tolist(), second.ids.tolist()) == ([4, 4, 4], [4, 5])
    assert third.gold is not None and third.gold.tolist() == [-2.0]
    assert third.entropy is not None and third.entropy.tolist() == [1.5]
    assert fourth.entropy is not None and fourth.entropy.tolist() == [math.inf, -math.inf]
    assert fourth.gold is not None and np.isnan(fourth.gold[0]) and fourth.gold[1] == -math.inf


def test_easydistills_lines_tell_of_the_end_of_their_sequences(tmp_path: Path) -> None:
    capture = lines(tmp_path / "logits.jsonl", [{"8": 0.75, "9": 0.2}, {"9": 1.0}])
    tokens = lines(tmp_path / "tokens.jsonl", {"input_ids": [5, 6, 7, 8, 9]})
    (one,) = read_topk([capture], reading(values="probabilities", offset=0, tokens=tokens))
    assert one.first == 3 and np.exp(one.logprobs).tolist() == pytest.approx([0.75, 0.2, 1.0])


@pytest.mark.parametrize("values", ["logprobs", "probabilities"])
def test_the_quick_way_through_entries_gives_what_the_plain_one_does(values: Any) -> None:
    numbers = [0.5, 0.25, 1, 0.001] if values == "probabilities" else [-0.7, -1.5, 0, -20.25]
    plain = [{"5": numbers[0], "19": numbers[1]}, None, {"7": numbers[2]}, {}]
    objects = [e and {k: {"logprob": v, "rank": 1} for k, v in e.items()} for e in plain]
    pairs = [e if e is None else [{"id": k, "logprob": v} for k, v in e.items()] for e in plain]
    first, *others = (
        parse_entries(one, reading(values=values), "here") for one in (plain, objects, pairs)
    )
    assert first[2].tolist() == [2, 0, 1, 0] and first[0].tolist() == [5, 19, 7]
    for other in others:
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(first, other, strict=True))


def test_token_strings_are_looked_up(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"input_ids": [1, 2], "logprobs": [{"a": -1, "b": -2}]})
    (one,) = read_topk([path], reading(keys="tokens"))
    assert one.ids.tolist() == [5, 6]
    with pytest.raises(ConfigError, match="no token id"):
        list(read_topk([path], reading()))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{nonsense", "no JSON"),
        ('{"input_ids": [1, 2], "logprobs": [{"3": -1, "3": -2}]}', "stands twice"),
        ({"input_ids": [1, 2]}, "no list of candidates"),
        ({"logprobs": [{"3": -1}]}, "which tokens"),
        ({"input_ids": [1, "x"], "logprobs": [{"3": -1}]}, "no ids"),
        ({"input_ids": [1, 2], "logprobs": ["3"]}, "no mapping"),
        ({"input_ids": [1, 2], "logprobs": [{"3": None}]}, "no number"),
        ({"input_ids": [1, 2], "logprobs": [{"-3": -1}]}, "no token id"),
        ({"input_ids": [1, 2], "logprobs": [{"3": -1}], "start": -1}, "begin at no token"),
        ({"input_ids": [1, 2], "logprobs": [{"3": -1}], "start": 3}, "begin at no token"),
        ({"input_ids": [1, 2], "logprobs": [{"3": -1}], "start": 10**30}, "begin at no token"),
        ({"input_ids": [1, 2.5], "logprobs": [{"3": -1}]}, "no ids"),
        ({"text": "a\ud800", "logprobs": [{"3": -1}]}, "no character"),
        ({"input_ids": [1] * 50, "logprobs": [{"3": -1}]}, "too long"),
        ({"input_ids": [1, 2], "logprobs": [{"3": -1}], "entropy": [1, 2]}, "a number for each"),
        ({"input_ids": [1, 2], "logprobs": [{"3": -1}], "entropy": [math.nan]}, "no number"),
        ({"input_ids": [1, 2], "logprobs": [{"3": -1}], "entropy": [True]}, "no number"),
        ({"input_ids": [1, 2], "logprobs": [{"3": -1}], "gold_logprobs": ["-1"]}, "no number"),
    ],
)
def test_lines_that_are_none_are_refused_with_their_place(
    tmp_path: Path, row: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk_jsonl, "LONGEST", 150)
    path = lines(tmp_path / "a.jsonl", {"input_ids": [1, 2], "logprobs": [{"3": -1}]}, row)
    with pytest.raises(ScholiastError, match=what) as error:
        list(read_topk([path], reading()))
    assert f"{path}, line 2" in error.value.where


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e39, -1e39])
def test_numbers_beyond_float32_are_infinite_to_both_ways_through_entries(value: float) -> None:
    for entry in ({"3": value}, [{"id": 3, "logprob": value}]):
        found = parse_entries([entry], reading(), "here")[1]
        assert found.tolist() == [math.copysign(math.inf, value > 0 or -1)]


def scratch(root: Path) -> None:
    one = sequence({3: -2.0, 4: -0.5}, {7: -1.0})
    with ScratchWriter(root) as writer:
        writer.add(one, clean(one, V, Tolerance()))
        writer.finish("key", {"entries": 2})


def test_facts_are_written_when_all_else_is_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: dict[str, int] = {}
    plain, write = os.fsync, durable.write_bytes

    def fsync(fd: int) -> None:
        plain(fd)
        flushed[Path(os.readlink(f"/proc/self/fd/{fd}")).name] = os.fstat(fd).st_size

    def write_bytes(path: Path, data: bytes) -> None:
        sizes = {name: (tmp_path / "capture" / name).stat().st_size for name in TYPES}
        assert path.name == FACTS and sizes.items() <= flushed.items()
        assert sizes["ids"] == 12
        write(path, data)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(durable, "write_bytes", write_bytes)
    scratch(tmp_path / "capture")
    found = Scratch.found(tmp_path / "capture", "key")
    assert found is not None and found.facts == {"entries": 2}
    assert Scratch.found(tmp_path / "capture", "another") is None


@pytest.mark.parametrize("name", ["ids", "entropy", "entry_ends"])
def test_a_scratch_folder_whose_files_are_shorter_or_gone_is_read_anew(
    tmp_path: Path, name: str
) -> None:
    scratch(tmp_path / "capture")
    path = tmp_path / "capture" / name
    os.truncate(path, path.stat().st_size - 4)
    assert Scratch.found(tmp_path / "capture", "key") is None
    path.unlink()
    assert Scratch.found(tmp_path / "capture", "key") is None
