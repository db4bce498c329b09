"""DistillKit's Parquet captures (github.com/arcee-ai/DistillKit): compressed top-k logprobs.

A row is a sequence: `input_ids` (n), and one byte string a position for `compressed_logprobs` and
`bytepacked_indices` (n − 1 of them: vLLM's prompt logprobs without the first, which has none). Position j
is the distribution of token j + 1. The files do not say how they are packed: that is in the compression
configuration, which newer captures have beside them as compression_config.yaml.

Byte strings: K ids of b = ⌈log2 d⌉ bits each, most significant bit first, zero bits at the end.
Logprobs, little-endian: exact_k values; the coefficients of the polynomial; for each bin a scale, and its
elements bit-packed like ids. With B bits an element e stands for (e − 2^(B−1))·scale (B = 1:
(2e − 1)·scale). Value i ≥ exact_k is Σ_j c_j·f_j(i − exact_k) plus its element; with delta_encoding all
are differences.

Shapes: R positions, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.exchange.captured import CapturedSequence, Reading, refuse, tokens_of
from pipeline.yaml_text import LARGEST, load_yaml
from storage.codec import from_bfloat16, to_bfloat16
from storage.errors import ConfigError
from storage.types import AnyArray, Float32, Int64

BESIDE = "compression_config.yaml"
"""The layout's file beside captures of newer versions."""
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
_PACKED = "list<list<uint8>>"
_LEGACY = ("packed_indices", "exact_values", "coeffs")
_AT_ONCE = 64  # sequences decoded together

FloatName = Literal["float16", "bfloat16", "float32", "float64"]
_WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


_Term = Literal["sqrt", "exp"] | Annotated[int, Field(ge=0, le=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bin(_Strict):
    """A run of quantised elements with one scale."""

    scale_dtype: FloatName
    element_bits: Annotated[int, Field(ge=1, le=63)]  # they are taken as int64
    num_elements: Annotated[int, Field(ge=1)]


class PackedLayout(_Strict):
    """DistillKit's DistributionQuantizationConfig, within what a capture can be: an id has a bit at
    least, its candidates differ, and a polynomial's table of values stays small."""

    d: Annotated[int, Field(ge=2, le=1 << 31)]
    k: Annotated[int, Field(ge=1)]
    exact_k: Annotated[int, Field(ge=0)]
    exact_dtype: FloatName = "float32"
    polynomial_terms: Annotated[tuple[_Term, ...], Field(max_length=32)] | None = None
    term_dtype: FloatName = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _possible(self) -> PackedLayout:
        if self.k > self.d:
            raise ValueError(f"k {self.k} is more than d {self.d}, which is how many ids there are")
        inexact = sum(one.num_elements for one in self.residual_bins)
        if self.exact_k + inexact > self.k:
            raise ValueError(
                f"exact_k and residual_bins hold {self.exact_k + inexact} values, more than k {self.k}"
            )
        return self

    @property
    def id_bits(self) -> int:
        """Bits of an id: ⌈log2 d⌉ in float32, as DistillKit takes it."""
        return math.ceil(float(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        return -(-self.k * self.id_bits // 8)

    @property
    def logprob_bytes(self) -> int:
        size = self.exact_k * _WIDTH[self.exact_dtype]
        size += len(self.polynomial_terms or ()) * _WIDTH[self.term_dtype]
        for one in self.residual_bins:
            size += _WIDTH[one.scale_dtype] + -(-one.num_elements * one.element_bits // 8)
        return size


def load_layout(path: Path | None, files: Sequence[Path]) -> PackedLayout:
    """Returns the layout in a YAML or JSON file, or in the one beside the captures.

    Raises:
        ConfigError: there is none, or it is not DistillKit's.
    """
    path = path or files[0].parent / BESIDE
    try:
        with path.open(encoding="utf-8") as file:
            return PackedLayout.model_validate(load_yaml(file.read(LARGEST + 1)))
    except FileNotFoundError:
        raise ConfigError(
            "DistillKit's captures do not describe themselves", where="--layout", found=f"no {path}",
            todo="give the compression configuration they were made with",
        ) from None  # fmt: skip
    except ValueError as error:  # no text, no YAML, or not these keys and values
        raise ConfigError(
            "the file is not a compression configuration of DistillKit", where=path,
            found=str(error).replace("\n", " ")[:200],
            todo="give the `d, k, exact_k, …` mapping with which the captures were made",
        ) from error  # fmt: skip


def unpack_bits(packed: AnyArray, bits: int, count: int) -> Int64:
    """Returns int64 [R, count] of bit-packed bytes [R, ⌈count·bits/8⌉], most significant bit first."""
    flat = np.unpackbits(packed, axis=1)[:, : count * bits].reshape(len(packed), count, bits)
    total = np.zeros((len(packed), count), np.int64)
    for i in range(bits):
        total = (total << 1) | flat[:, :, i]
    return total


@np.errstate(all="ignore")  # what is not finite is refused later
def decode_logprobs(packed: AnyArray, layout: PackedLayout) -> Float32:
    """Returns float32 [R, K] of the bytes [R, logprob_bytes].

    In float32 throughout but where the writer's own rounding is undone (the polynomial in term_dtype,
    which residuals were taken from); DistillKit also rounds the result to exact_dtype.
    """
    exact, terms = layout.exact_k, layout.polynomial_terms or ()
    take = _Taker(packed)
    values = np.zeros((len(packed), layout.k), np.float32)
    values[:, :exact] = take.floats(layout.exact_dtype, exact)
    if terms:
        coefficients = take.floats(layout.term_dtype, len(terms))
        values[:, exact:] = _polynomial(coefficients, layout)
    at = exact
    for one in layout.residual_bins:
        scale = take.floats(one.scale_dtype, 1)
        size = -(-one.num_elements * one.element_bits // 8)
        elements = unpack_bits(take.bytes(size), one.element_bits, one.num_elements)
        signed = (
            2 * elements - 1 if one.element_bits == 1 else elements - (1 << one.element_bits - 1)
        )
        values[:, at : at + one.num_elements] += (signed * scale).astype(np.float32)
        at += one.num_elements
    return np.cumsum(values, 1, np.float32) if layout.delta_encoding else values


@dataclass
class _Taker:
    """Takes columns of bytes from the left."""

    packed: AnyArray
    at: int = 0

    def bytes(self, count: int) -> AnyArray:
        piece = self.packed[:, self.at : self.at + count]
        self.at += count
        return np.ascontiguousarray(piece)

    def floats(self, dtype: FloatName, count: int) -> Float32:
        raw = self.bytes(count * _WIDTH[dtype])
        if not count:
            return np.zeros((len(raw), 0), np.float32)
        if dtype == "bfloat16":
            return from_bfloat16(raw.view("<u2"))
        return raw.view(f"<f{_WIDTH[dtype]}").astype(np.float32)


def _polynomial(coefficients: Float32, layout: PackedLayout) -> Float32:
    count = layout.k - layout.exact_k
    t = np.linspace(0, 1, count) if layout.normalize_t else np.arange(count, dtype=np.float64)
    names = {"sqrt": np.sqrt, "exp": np.exp}
    table = np.stack(
        [names[f](t) if isinstance(f, str) else t**f for f in layout.polynomial_terms or ()], 1
    )
    terms = _as(table.astype(np.float32), layout.term_dtype)
    products = _as(terms * coefficients[:, None, :], layout.term_dtype)
    return _as(products.sum(-1, dtype=np.float32), layout.term_dtype)


def _as(values: Float32, dtype: FloatName) -> Float32:
    """Returns the values rounded to a type that is coarser than float32."""
    if dtype == "bfloat16":
        finite = np.nan_to_num(values)
        return np.where(np.isfinite(values), from_bfloat16(to_bfloat16(finite)), values)
    return values.astype(np.float16).astype(np.float32) if dtype == "float16" else values


def read_distillkit(files: Sequence[Path], reading: Reading) -> Iterator[CapturedSequence]:
    """Yields the sequences of Parquet captures, row group by row group.

    Raises:
        ConfigError: no layout. CorruptShard: a file or row is not as the layout says.
    """
    layout = load_layout(reading.layout, files)
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                _require_columns(file.schema_arrow, path)
                row = 0
                for batch in file.iter_batches(_AT_ONCE, columns=list(COLUMNS)):
                    yield from _sequences(batch, layout, reading.offset, path, row)
                    row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise refuse(f"no readable Parquet file: {error}", path) from error


def _require_columns(schema: pa.Schema, path: Path) -> None:
    names = schema.names
    if all(names.count(name) == 1 for name in COLUMNS):
        for name in COLUMNS[1:]:
            if not _holds_bytes(schema.field(name).type):
                raise refuse(f"{name} is no list of byte strings as DistillKit writes them", path,
                             expected=_PACKED, found=schema.field(name).type)  # fmt: skip
        return
    if set(_LEGACY) <= set(names):
        raise refuse(
            "captures of DistillKit's legacy format hold centred logits without their normaliser: they "
            "tell no probabilities", path, expected=list(COLUMNS), found=list(names),
        )  # fmt: skip
    raise refuse("no capture of DistillKit", path, expected=list(COLUMNS), found=list(names))


def _holds_bytes(kind: pa.DataType) -> bool:
    """Returns whether a type is lists of lists of integers, of whatever width: values are looked at."""
    for _ in range(2):
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return False
        kind = kind.value_type
    return bool(pa.types.is_integer(kind))


def _sequences(
    batch: pa.RecordBatch, layout: PackedLayout, offset: int, path: Path, first_row: int
) -> Iterator[CapturedSequence]:
    tokens, packed, indices = (batch.column(name) for name in COLUMNS)
    for i in range(len(batch)):
        where = f"{path}, row {first_row + i}"
        values = _bytes(packed[i], layout.logprob_bytes, "compressed_logprobs", where)
        ids = _bytes(indices[i], layout.id_bytes, "bytepacked_indices", where)
        if len(values) != len(ids):
            raise refuse("ids and logprobs of different positions", where, expected=len(values),
                         found=len(ids))  # fmt: skip
        yield CapturedSequence(
            where, tokens_of(tokens[i].as_py() or (), where), offset,
            np.full(len(values), layout.k, np.int64),
            unpack_bits(ids, layout.id_bits, layout.k).astype(np.int32).reshape(-1),
            decode_logprobs(values, layout).reshape(-1),
        )  # fmt: skip


def _bytes(value: Any, width: int, column: str, where: str) -> AnyArray:
    """Returns a list of byte lists as uint8 [R, width]."""
    lists = value.values
    if lists is None or not len(lists):
        return np.zeros((0, width), np.uint8)
    sizes = np.diff(lists.offsets.to_numpy())
    if lists.null_count or (sizes != width).any():
        raise refuse(
            f"{column} is not packed as the layout says", where, expected=f"{width} bytes a position",
            found=f"{sizes[sizes != width][:1].tolist() or 'nulls'}",
        )  # fmt: skip
    flat = lists.flatten()
    try:
        found: AnyArray = flat.cast(pa.uint8()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise refuse(f"{column} holds what is no byte", where, expected="0 to 255",
                     found=" ".join(str(error).split()))  from error  # fmt: skip
    if flat.null_count:
        raise refuse(f"{column} holds what is no byte", where, expected="0 to 255", found="null")
    return found.reshape(-1, width)
