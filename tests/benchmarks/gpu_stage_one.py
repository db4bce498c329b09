"""The second part of gpu.py: what a teacher's reading takes, bare, annotated, and cached."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_parts import (
    BATCH,
    KEPT,
    Planner,
    disk_bytes,
    job_of,
    layout_of,
    make_corpus,
    model_folder,
    random_teacher,
)
from gpu_rows import Peak, Recorder, timed, within

import stages.annotate
import stages.teacher
from stages.annotate import PartAnnotator
from stages.cache_teachers import cache_teachers
from stages.options import StoreOptions, TeacherOptions
from stages.part_log import log_path
from stages.progress import Silent
from stages.teacher import TransformersTeacher
from stages.tokenizer import load_tokenizer
from storage.blocks import BlockReader
from storage.layout import Layout
from storage.orders import learn_orders
from storage.writer import CacheWriter


@contextmanager
def at_hand(model: Any) -> Iterator[None]:
    """Lets stage one's teacher find this model where it would load one."""
    with patch.object(stages.teacher, "load_causal_lm", lambda *_, **__: model):
        yield


class OneTeacher:
    """A teacher in place, and the rows about it."""

    def __init__(self, recorder: Recorder, root: Path, name: str, reader: BlockReader) -> None:
        self.recorder, self.root, self.name, self.reader = recorder, root, name, reader
        shape, device = recorder.sizes.teachers[name], recorder.device
        self.folder = model_folder(root, name, shape)
        self.layer = max(1, shape.layers - 2)
        self.hidden = shape.hidden
        began = time.perf_counter()
        self.model = random_teacher(self.folder, device)
        options = TeacherOptions(model=str(self.folder), feature_layers=(self.layer,))
        with at_hand(self.model):
            self.teacher = TransformersTeacher(name, self.folder, options, device)
        print(f"{name}: made in {time.perf_counter() - began:.1f} s", flush=True)
        self.blocks = reader.read(list(range(BATCH)))
        self.plan = Planner(root, recorder.sizes, recorder.gpu, recorder.facts["flops"])

    def layout(self, preset: str) -> Layout:
        return layout_of(self.reader.info, preset, self.layer, self.hidden)

    def close(self) -> None:
        self.teacher.close()
        del self.model

    # -- the rows

    def rate(self, run: Callable[[], object], chunk: int, preset: str) -> dict[str, Any]:
        """Returns tokens/s and peak of something that reads one batch, and the plan's."""
        recorder, peak = self.recorder, Peak(self.recorder.device)
        seconds, repeats = timed(run, recorder.device, 3 * recorder.sizes.pause)
        tokens = BATCH * recorder.sizes.length
        return {
            "tokens_per_s": tokens / seconds, "peak_bytes": peak.bytes, "beyond_bytes": peak.beyond,
            **self.plan.teacher(self.folder, (self.layer,), chunk, preset), "repeats": repeats,
        }  # fmt: skip

    def hidden_states(self, layers: tuple[int, ...] = ()) -> torch.Tensor:
        tokens, positions = (torch.from_numpy(a) for a in (
            self.blocks.inputs.astype("int64"), self.blocks.positions))  # fmt: skip
        return self.teacher.forward(tokens, positions, layers).last

    def with_head(self, chunk: int) -> None:
        for rows in self.hidden_states().flatten(0, 1).split(chunk):
            self.teacher.logits(rows)

    def annotator(self, preset: str, chunk: int, compiled: bool = False) -> PartAnnotator:
        return PartAnnotator(self.name, self.teacher, self.layout(preset), chunk, compiled)

    def annotate(self, annotator: PartAnnotator) -> None:
        annotator.annotate(self.blocks, self.orders, BATCH, lambda _: None, lambda *_: None)

    def rows(self) -> None:
        """Measures all of them; those that tell most first."""
        recorder, chunks = self.recorder, self.recorder.sizes.chunks
        heads = self.annotator("balanced", chunks[0]).heads(self.blocks, BATCH)
        self.orders = learn_orders(heads, recorder.sizes.vocab)

        def row(name: str, chunk: int, preset: str, run: Callable[[], object]) -> None:
            recorder.row(
                name, lambda: self.rate(run, chunk, preset), teacher=self.name, chunk_tokens=chunk
            )

        def annotated(preset: str, chunk: int) -> Callable[[], object]:
            made = self.annotator(preset, chunk)
            return partial(self.annotate, made)

        first = chunks[0]
        row("decoder alone", first, "balanced", self.hidden_states)
        row("and head", first, "balanced", partial(self.with_head, first))
        for preset, (k, draws) in KEPT.items():
            row(f"annotated, {k} + {draws}", first, preset, annotated(preset, first))
        self.caching("balanced", first)
        for chunk in chunks[1:]:
            row("and head", chunk, "balanced", partial(self.with_head, chunk))
            row("annotated, 64 + 0", chunk, "balanced", annotated("balanced", chunk))
        if self.name == list(recorder.sizes.teachers)[-1]:  # the quick one
            self.caching("balanced", chunks[-1])
            self.caching("compact", first)

    def compiled_row(self) -> None:
        """store.compile: its compilation is in row_seconds."""
        chunk = self.recorder.sizes.chunks[-1]
        made = self.annotator("balanced", chunk, True)
        self.recorder.row(
            "annotated, 64 + 0, compiled",
            lambda: self.rate(partial(self.annotate, made), chunk, "balanced"),
            teacher=self.name, chunk_tokens=chunk,
        )  # fmt: skip

    def caching(self, preset: str, chunk: int) -> None:
        k, draws = KEPT[preset]
        self.recorder.row(
            f"cached, {k} + {draws}", lambda: self._cached(preset, chunk), teacher=self.name,
            chunk_tokens=chunk,
        )  # fmt: skip

    def _cached(self, preset: str, chunk: int) -> dict[str, Any]:
        recorder, layout = self.recorder, self.layout(preset)
        root = self.root / "caches" / f"{self.name}-{preset}-{chunk}"
        shutil.rmtree(root, ignore_errors=True)
        job = job_of(root, self.folder, self.name, self.reader.info, layout)
        store = StoreOptions(preset=preset, chunk_tokens=chunk)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(self.folder, "the benchmark's")
        tokens = layout.blocks * layout.block_length
        peak, begun = Peak(recorder.device), time.perf_counter()
        with at_hand(self.model), seconds_of_caching() as spent:
            cache_teachers(
                [job], store, self.reader.root, tokenizer, recorder.device.type, Silent()
            )  # fmt: skip
        seconds = time.perf_counter() - spent["ready"]
        size = disk_bytes(root)
        log = [json.loads(line) for line in log_path(root).read_text().splitlines()]
        largest = max(peak.bytes, *(part["peak_bytes"] for part in log))  # each part counts anew
        shutil.rmtree(root)
        return {
            "tokens_per_s": tokens / seconds, "peak_bytes": largest,
            "beyond_bytes": largest - peak.before,
            **self.plan.teacher(self.folder, (self.layer,), chunk, preset),
            "begin_seconds": spent["ready"] - begun, "encode_share": spent["encode"] / seconds,
            "write_share": spent["write"] / seconds, "disk_bytes_a_token": size / tokens,
        }  # fmt: skip


@contextmanager
def seconds_of_caching() -> Iterator[dict[str, float]]:
    """Tells when the first part was begun ("ready", by perf_counter), and counts the seconds of encoding,
    and of compressing and writing parts, on any thread."""
    seconds, lock = {"ready": 0.0, "encode": 0.0, "write": 0.0}, threading.Lock()

    def counted(key: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                with lock:
                    seconds[key] += time.perf_counter() - begun

        return run

    encode = counted("encode", stages.annotate.encode_rows)
    write, make = counted("write", CacheWriter.write_part), CacheWriter.__init__

    def made(*arguments: Any) -> None:
        make(*arguments)
        seconds["ready"] = time.perf_counter()

    with (
        patch.object(stages.annotate, "encode_rows", encode),
        patch.object(CacheWriter, "__init__", lambda *a: made(*a)),
        patch.object(CacheWriter, "write_part", lambda *a, **n: write(*a, **n)),
    ):
        yield seconds


def run(recorder: Recorder) -> None:
    root = recorder.folder / "gpu"
    shutil.rmtree(root, ignore_errors=True)
    try:
        reader = make_corpus(root / "corpus", recorder.sizes)
        last = list(recorder.sizes.teachers)[-1]
        for number, name in enumerate(recorder.sizes.teachers):
            try:
                # A teacher may take its share of what is left, so that each has some.
                with recorder.up_to(1.0 / (len(recorder.sizes.teachers) - number)):
                    _rows_of(recorder, root, name, reader, compiled=name == last)
            except Exception as error:  # does not fit, say; the next one is smaller
                recorder.failed(f"teacher {name}", error)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _rows_of(
    recorder: Recorder, root: Path, name: str, reader: BlockReader, compiled: bool
) -> None:
    with within(recorder.left):
        one = OneTeacher(recorder, root, name, reader)
    try:
        one.rows()
        if compiled:
            one.compiled_row()
    finally:
        one.close()
