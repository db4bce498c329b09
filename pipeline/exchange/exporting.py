"""Caches → files for other tools: OUT/TEACHER/part-000000.parquet or .jsonl, a file a part.

A file is written under another name, flushed and renamed, so it is whole where it stands; `export.json`
beside it says of which cache. A stopped export goes on with the parts that are not there. Memory: a
block's rows.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.exchange.export_rows import BlockRows, block_rows, json_lines_of, parquet_schema
from stages.progress import Progress
from storage import durable, manifest
from storage.blocks import BlockReader
from storage.errors import ConfigError, IncompleteCache, StaleCache
from storage.fingerprint import canonical_json, fingerprint
from storage.reader import CacheReader
from storage.stores import CACHE, kind_of
from storage.writer import owners

if TYPE_CHECKING:
    from pipeline.commands.stores import Target

VERSION = 1
"""Of the columns and keys that an export has."""
ABOUT = "export.json"
_SUFFIX = {"parquet": ".parquet", "topk-jsonl": ".jsonl"}


def export_all(
    target: Target, out: Path, kind: str, teachers: Sequence[str], corpus: Path | None,
    progress: Progress, dry_run: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Exports the caches that a CACHE argument names.

    Args:
        out: the folder; a folder a teacher is made in it.
        kind: "parquet" or "topk-jsonl".
        teachers: these alone, if any are named.
        corpus: where it lies, if the argument does not name it.

    Returns:
        teacher → {folder, parts, written, bytes (of all its files)}.

    Raises:
        ConfigError: no such teacher, or no corpus. IncompleteCache: no cache, or parts are missing.
        StaleCache: a cache is of another corpus, or `out` holds another export.
        MissingShard, CorruptShard, DiskFull
    """
    caches = {n: root for n, root in target.stores.items() if kind_of(root) == CACHE}
    corpora = [root for root in target.stores.values() if kind_of(root) != CACHE]
    unknown = [name for name in teachers if name not in caches]
    if unknown or not caches:
        raise ConfigError(
            "there is no such cache", where="--teacher" if unknown else "CACHE",
            expected=f"one of {list(caches)}", found=", ".join(unknown) or "no cache",
            todo="name another",
        )  # fmt: skip
    folder = corpus or next(iter(corpora), None)
    if folder is None:
        raise ConfigError(
            "an export needs the corpus that the cache belongs to", where="CACHE",
            todo="name the run's folder or its configuration, or give --corpus FOLDER",
        )  # fmt: skip
    blocks = BlockReader(folder)
    return {
        Path(name).name: _Export(CacheReader(root, name), blocks, out / Path(name).name, kind)
        .run(progress, dry_run)
        for name, root in caches.items()
        if not teachers or name in teachers
    }  # fmt: skip


class _Export:
    """One teacher's cache and the folder that its files go to."""

    def __init__(self, cache: CacheReader, corpus: BlockReader, folder: Path, kind: str) -> None:
        if cache.identity["corpus"] != corpus.info.fingerprint:
            raise StaleCache(
                f"the cache of teacher {cache.name!r} belongs to another corpus", where=cache.root,
                expected=corpus.info.fingerprint[:16], found=cache.identity["corpus"][:16],
                todo="name the corpus that it was made from",
            )  # fmt: skip
        self._cache, self._corpus, self._folder, self._kind = cache, corpus, folder, kind
        self.about: dict[str, Any] = {
            "version": VERSION, "format": kind, "teacher": Path(cache.name).name,
            "cache": fingerprint(cache.identity), "identity": cache.identity,
            "layout": cache.layout.to_dict(), "vocab_size": cache.layout.vocab_size,
        }  # fmt: skip

    def run(self, progress: Progress, dry_run: bool) -> dict[str, Any]:
        """Writes what is missing."""
        layout = self._cache.layout
        self._require_complete()
        self._require_own()
        pending = [p for p in range(layout.parts) if not self._path(p).exists()]
        if pending and not dry_run:
            durable.require_free(
                self._folder, int(layout.bytes_per_token_raw() * layout.blocks_of(pending))
                * layout.block_length, "the export", "--teacher",
            )  # fmt: skip
            durable.write_bytes(self._folder / ABOUT, canonical_json(self.about))
            total = layout.blocks * layout.block_length
            left = layout.blocks_of(pending) * layout.block_length
            progress.start(f"export {self._cache.name}", total, "token", total - left)
            for part in pending:
                self._write(part, progress.advance)
            progress.finish()
        files = [self._path(p) for p in range(layout.parts) if self._path(p).exists()]
        return {
            "folder": str(self._folder), "parts": layout.parts, "written": len(pending),
            "bytes": sum(path.stat().st_size for path in files),
        }  # fmt: skip

    def _require_complete(self) -> None:
        layout, root = self._cache.layout, self._cache.root
        done = manifest.done_parts(root, owners(self._cache.identity, layout), layout.parts)
        if len(done) < layout.parts:
            raise IncompleteCache(
                f"the cache of teacher {self._cache.name!r} is not complete", where=root,
                expected=f"{layout.parts} parts", found=len(done), todo="run `scholiast cache-teachers`",
            )  # fmt: skip

    def _require_own(self) -> None:
        """Refuses a folder that holds the export of something else."""
        path = self._folder / ABOUT
        try:
            stands = json.loads(path.read_bytes())
        except FileNotFoundError:
            if self._folder.is_dir() and any(self._folder.iterdir()):
                raise ConfigError(
                    "the folder holds files that are no export", where=self._folder,
                    todo="name another",
                ) from None  # fmt: skip
            return
        except ValueError:
            stands = None
        if stands != json.loads(canonical_json(self.about)):
            found = stands if isinstance(stands, dict) else {}
            raise StaleCache(
                "the folder holds an export of something else", where=path,
                expected=f"{self._kind} of cache {self.about['cache'][:16]}",
                found=f"{found.get('format')} of cache {str(found.get('cache'))[:16]}",
                todo="name another folder, or delete this one",
            )  # fmt: skip

    def _path(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}{_SUFFIX[self._kind]}"

    def _write(self, part: int, advance: Callable[[int], None]) -> None:
        final = self._path(part)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        with durable.disk_errors(self._folder):
            try:
                if self._kind == "parquet":
                    self._parquet(temporary, part, advance)
                else:
                    self._json_lines(temporary, part, advance)
                durable.fsync_file(temporary)
                temporary.replace(final)
                durable.fsync_folder(final.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def _rows(self, part: int, advance: Callable[[int], None]) -> Any:
        for block in range(*self._cache.layout.part_range(part)):
            rows: BlockRows = block_rows(self._cache, self._corpus, block)
            yield rows
            advance(self._cache.layout.block_length)

    def _parquet(self, path: Path, part: int, advance: Callable[[int], None]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = json.dumps({**self.about, "part": part})
        schema = parquet_schema(self._cache.layout).with_metadata({"scholiast": text})
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for rows in self._rows(part, advance):
                writer.write_table(pa.Table.from_pylist([rows.columns()], schema))

    def _json_lines(self, path: Path, part: int, advance: Callable[[int], None]) -> None:
        with path.open("w", encoding="ascii") as file:
            for rows in self._rows(part, advance):
                file.writelines(f"{line}\n" for line in json_lines_of(rows))
