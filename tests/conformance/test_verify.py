"""Every byte is checked: damages by the hundred are found, none is read, and repair mends them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lab, build_parts, digests

from storage import manifest
from storage.blocks import BlockReader
from storage.errors import ScholiastError
from storage.fingerprint import canonical_json, fingerprint
from storage.reader import CacheReader
from storage.repair import plan_repair, repair
from storage.stores import CACHE, CORPUS, INFO, find_stores, kind_of, open_store
from storage.verify import Report, verify

Cli = Callable[..., Any]
DAMAGES = 500


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab with a finished stage one in few parts; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    build_parts(root)
    lab = Lab(root)
    lab.config["corpus"]["blocks_per_part"] = 24
    lab.workspace().cache_teachers()
    return lab


@pytest.fixture
def run(made: Lab, tmp_path: Path) -> Path:
    """A copy of its run folder."""
    return Path(shutil.copytree(made.root / "run", tmp_path / "run"))


def arrays(value: Any) -> Iterator[Any]:
    """Every array of the notes or blocks, whatever dataclasses hold them."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from arrays(value[key])
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from arrays(getattr(value, name))


def read_all(root: Path) -> str:
    """Reads a whole store as training does; returns a digest of all values."""
    digest = hashlib.sha256()
    if kind_of(root) == CORPUS:
        reader: Any = BlockReader(root)
        count = reader.info.blocks
    else:
        reader = CacheReader(root)
        count = reader.layout.blocks
    for array in arrays(reader.read(np.arange(count))):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def objects(root: Path) -> dict[str, list[Path]]:
    """Every file of a store that something relies on, by kind: an array's shards are one kind."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root)
        if name.name == "log.jsonl":  # measurements
            continue
        shard = "c" in name.parts
        kind = "/".join(name.parts[: name.parts.index("c")]) if shard else name.parts[0]
        kinds.setdefault("zarr.json" if name.name == "zarr.json" else kind, []).append(path)
    return kinds


def damage(how: str, data: bytes, generator: np.random.Generator) -> bytes | None:
    """Returns what becomes of a file's bytes; None deletes it."""
    at = int(generator.integers(len(data)))
    if how == "bit":
        return data[:at] + bytes([data[at] ^ (1 << int(generator.integers(8)))]) + data[at + 1 :]
    if how == "byte":
        other = (data[at] + int(generator.integers(1, 256))) % 256
        return data[:at] + bytes([other]) + data[at + 1 :]
    if how == "truncated":
        return data[:at]
    return data + generator.bytes(1 + at % 40) if how == "longer" else None


WAYS = ("bit", "byte", "truncated", "longer", "deleted")


@pytest.mark.long
def test_five_hundred_damages_are_found_and_never_read(run: Path) -> None:
    """One at a time, over every kind of object; the bytes are put back after each."""
    generator = np.random.default_rng(0)
    stores = {root: (read_all(root), objects(root)) for root in (run / "corpus", run / "cache/one")}
    assert all(verify(root).sound and verify(root).complete for root in stores)
    vouched = {root: relied_on(root) for root in stores}
    kinds = [(root, kind) for root, (_, found) in stores.items() for kind in found]
    outcomes: Counter[str] = Counter()
    for number in range(DAMAGES):
        root, kind = kinds[number % len(kinds)]
        truth, found = stores[root]
        path = found[kind][int(generator.integers(len(found[kind])))]
        how, data = WAYS[number // len(kinds) % len(WAYS)], path.read_bytes()
        changed = damage(how, data, generator)
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        what = f"damage {number}: {path.relative_to(run)} {how}"
        report = verify(root, workers=2)
        assert not (report.sound and report.complete), f"not found: {what}"
        try:
            value = read_all(root)
        except ScholiastError:
            outcomes["refused"] += 1
        else:
            assert value == truth, f"read as if nothing were wrong: {what}"
            assert path not in vouched[root], f"read: {what}"
            outcomes["right all the same"] += 1  # what our reader does not look at
        path.write_bytes(data)
        outcomes[f"{root.name} {kind}"] += 1
        outcomes[how] += 1
    assert outcomes["refused"] + outcomes["right all the same"] == DAMAGES
    assert min(outcomes[f"{root.name} {kind}"] for root, kind in kinds) >= DAMAGES // len(kinds)
    assert min(outcomes[how] for how in WAYS) >= DAMAGES // len(WAYS) // 2
    assert all(verify(root, deep=True).sound for root in stores)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def manifest_of(root: Path, part: int) -> Path:
    return next((root / "manifests").glob(f"{part:06d}*.json"))


def shards_of(root: Path, part: int) -> list[Path]:
    done = open_store(root)[0].load(part)
    return [root / name for name in sorted(done.objects)] if done else []


def relied_on(root: Path) -> set[Path]:
    """The files without which nothing may be read: manifests, what they vouch for, the whole's."""
    store, _ = open_store(root)
    parts = store.listed()
    files = {root / INFO[store.kind], *(manifest_of(root, part) for part in parts)}
    return files.union(*(shards_of(root, part) for part in parts))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_repair_and_run_end_in_the_same_bits(made: Lab, run: Path, cli: Cli, seed: int) -> None:
    """Several damages at once; what was sound is not done again."""
    generator, before = np.random.default_rng(seed), digests(run)
    choices = [path for root in find_stores(run).values() for kind in objects(root).values()
               for path in kind]  # fmt: skip
    for index in generator.choice(len(choices), 5, replace=False):
        how = WAYS[int(generator.integers(len(WAYS)))]
        changed = damage(how, choices[index].read_bytes(), generator)
        if changed is None:
            choices[index].unlink()
        else:
            choices[index].write_bytes(changed)
    config = made.write("repaired.yaml", run_dir=str(run))
    stores = find_stores(run)
    redone = {
        name: {p.part for p in verify(root).problems} | set(verify(root).missing)
        for name, root in stores.items()
    }
    sound = {
        path: path.stat().st_mtime_ns
        for name, root in stores.items() if kind_of(root) == CACHE
        for part in set(open_store(root)[0].listed()) - redone[name]
        for path in shards_of(root, part)
    }  # fmt: skip
    assert cli("repair", config).exit_code == 0
    result = cli("cache-teachers", config)
    assert result.exit_code == 0, result.output
    again = cli("repair", config)  # metadata that could not be derived while cache.json was gone
    assert again.exit_code == 0
    assert digests(run) == before
    assert cli("verify", config, "--deep").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in sound} == sound


def test_hole_in_the_corpus_is_filled(made: Lab, run: Path, cli: Cli) -> None:
    """Packing goes on from the last part before the hole; what follows gets the same bytes."""
    before = digests(run)
    flip(next((run / "corpus/blocks").glob("*1.arrow")))
    config = made.write("hole.yaml", run_dir=str(run))
    result = cli("repair", run, "--dry-run")
    assert "would delete: corpus, corpus.json" in result.output and "prepare" in result.output
    assert cli("repair", run).exit_code == 0
    assert not (run / "corpus/corpus.json").exists()
    report = verify(run / "corpus")
    assert report.missing == (1,) and report.sound and not report.complete
    assert cli("prepare", config).exit_code == 0
    assert digests(run) == before


def grown(lab: Lab, run: Path) -> Path:
    """The configuration with a source more."""
    more = {"domain": "z", "format": "jsonl", "path": f"{lab.root}/y.jsonl"}
    sources = [*lab.config["corpus"]["sources"], more]
    return lab.write("grown.yaml", run_dir=str(run), corpus__sources=sources)


def test_grown_corpus_and_caches_are_verified_and_mended(made: Lab, run: Path, cli: Cli) -> None:
    """Parts of two generations belong to two identities; both are as sound, and mended alike."""
    config = grown(made, run)
    assert cli("append", config).exit_code == 0
    before, stores = digests(run), find_stores(run)
    reports = {name: verify(root, deep=True) for name, root in stores.items()}
    assert all(report.sound and report.complete for report in reports.values())
    assert not any(report.leftovers for report in reports.values())
    for name, root in stores.items():
        store = reports[name].store
        assert store.owners is not None and len(store.owners.fingerprints) == 2
        for part in (0, store.owners.first_parts[1]):
            flip(shards_of(root, part)[0])
        assert [p.part for p in verify(root).problems] == [0, store.owners.first_parts[1]]
    assert cli("repair", config).exit_code == 0
    assert all(verify(root).sound for root in stores.values())
    assert cli("cache-teachers", config).exit_code == 0
    assert digests(run) == before


def test_lost_corpus_json_of_a_grown_corpus(made: Lab, run: Path, cli: Cli) -> None:
    """begun.json says how it had grown, and is checked against the parts."""
    config, root = grown(made, run), run / "corpus"
    assert cli("append", config).exit_code == 0
    before = digests(run)
    (root / "corpus.json").unlink()
    report = verify(root)
    assert report.sound and not report.complete
    begun = (root / "begun.json").read_bytes()
    for damaged in (b"", begun[:-9], begun.replace(b'"domain":"z"', b'"domain":"x"')):
        (root / "begun.json").write_bytes(damaged)
        assert [(p.path, p.part) for p in verify(root).problems] == [("begun.json", None)]
    (root / "begun.json").write_bytes(begun)
    assert cli("prepare", config).exit_code == 0
    assert digests(run) == before


def test_append_under_way_is_not_left_over(made: Lab, run: Path, cli: Cli) -> None:
    """Parts beyond corpus.json's have manifests: a killed append goes on from them."""
    config, root = grown(made, run), run / "corpus"
    old = (root / "corpus.json").read_bytes()
    assert cli("append", config).exit_code == 0
    before, parts = digests(run), verify(root).checked
    (root / "corpus.json").write_bytes(old)  # as if killed before the last step
    report = verify(root)
    assert report.sound and report.complete and report.checked < parts
    assert report.leftovers and not any(leftover.ours for leftover in report.leftovers)
    repair(report, clean=True)
    assert cli("append", config).exit_code == 0
    assert digests(run) == before


def test_lost_identity_keeps_the_parts(made: Lab, run: Path, cli: Cli) -> None:
    """A damaged cache.json is dropped, and written again by the next run."""
    before = digests(run)
    flip(run / "cache/one/cache.json")
    config = made.write("lost.yaml", run_dir=str(run))
    result = cli("verify", config)
    assert result.exit_code == 1 and "bad: one, cache.json" in result.output
    assert "cache-teachers" in cli("repair", config).output
    assert cli("verify", config).exit_code == 1  # still missing
    assert cli("cache-teachers", config).exit_code == 0
    assert digests(run) == before and cli("verify", config).exit_code == 0


def test_altered_metadata_are_never_written_by(made: Lab, run: Path, cli: Cli) -> None:
    """zarr-python would write as they say; the part is refused, repair derives them again."""
    root, before = run / "cache/one", digests(run)
    some = sorted(root.glob("*/*/zarr.json"))[0]
    body = json.loads(some.read_text())
    body["data_type"] = "int8"
    some.write_text(json.dumps(body))
    manifest_of(root, 0).unlink()
    config = made.write("altered.yaml", run_dir=str(run))
    result = cli("cache-teachers", config)
    assert result.exit_code == 1 and "scholiast repair" in result.output
    assert cli("repair", config).exit_code == 0
    assert cli("cache-teachers", config).exit_code == 0
    assert digests(run) == before


def test_manifest_of_another_part_is_found(run: Path) -> None:
    root = run / "cache/one"
    shutil.copy(manifest_of(root, 0), manifest_of(root, 1))
    problems = verify(root).problems
    assert [p.part for p in problems] == [1] and problems[0].mend == "redo"


def altered(path: Path, **changes: Any) -> None:
    """Writes a manifest anew, its own checksum right."""
    body = {**json.loads(path.read_bytes()), **changes}
    del body["sha256"]
    path.write_bytes(canonical_json({**body, "sha256": fingerprint(body)}))


@pytest.mark.parametrize("name", ["../precious", "/precious", "a/../../precious"])
def test_a_manifest_reaches_nothing_outside_its_folder(run: Path, name: str) -> None:
    precious = run / "cache" / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    path = min((run / "cache/one/manifests").iterdir())
    if name.startswith("/"):
        name = str(precious)
    altered(path, objects={name: [4, "0" * 64]})
    report = verify(run / "cache/one")
    assert [p.what for p in report.problems] == ["a manifest names a file outside its folder"]
    repair(report, clean=True)
    assert (precious / "file").read_text() == "mine" and not path.exists()


def test_a_damaged_part_of_something_else_is_not_touched(run: Path) -> None:
    path = min((run / "cache/one/manifests").iterdir())
    altered(path, fingerprint="f" * 64)
    shard = run / "cache/one/notes.zarr/entropy/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    report = verify(run / "cache/one")
    assert [p.mend for p in report.problems] == ["none"]
    before = digests(run)
    repair(report)
    assert digests(run) == before


def test_part_that_was_written_wrong_is_found_by_decoding(run: Path) -> None:
    """sha256 vouches for what was written, not that it was right: another array's shard, say."""
    root = run / "cache/one"
    store, _ = open_store(root)
    vouched = store.load(0)
    assert vouched is not None
    shards = sorted(vouched.objects, key=lambda name: vouched.objects[name])
    shutil.copy(root / shards[0], root / shards[-1])  # the smallest in place of the largest
    objects_now = manifest.describe(root, shards)
    manifest.save(root, manifest.Manifest(**{**vars(vouched), "objects": objects_now}))
    assert verify(root).sound
    report = verify(root, deep=True)
    assert [p.part for p in report.problems] == [0]


def leave_things(root: Path) -> dict[str, bool]:
    """Leaves what stopped writers leave, and a file of the user's; returns which are ours."""
    shard = shards_of(root, 1)[0].relative_to(root)
    left = {
        ".cache.json.0123456789abcdef0123456789abcdef.tmp": True,
        ".notes.zarr.0123456789abcdef0123456789abcdef.tmp/zarr.json": True,
        f"{shard.parent}/0.0123456789abcdef0123456789abcdef.partial": True,
        str(shard.parent / shard.name).replace("/c/1", "/c/77"): True,
        "notes.txt": False,
    }
    for name in left:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"some")
    return left


@pytest.mark.parametrize("name", ["corpus/corpus.json", "cache/one/cache.json"])
def test_another_format_is_left_alone(run: Path, name: str) -> None:
    """Nothing else can be told of it, so nothing is called bad or left over, nothing deleted."""
    path = run / name
    body = json.loads(path.read_bytes())
    del body["sha256"]
    body["format"] += 1
    path.write_bytes(canonical_json({**body, "sha256": fingerprint(body)}))
    before, report = digests(run), verify(path.parent)
    assert [(p.path, p.mend) for p in report.problems] == [(path.name, "none")]
    assert not report.leftovers and repair(report, clean=True) == []
    assert digests(run) == before


def test_leftovers_are_listed_apart_and_cleaned(run: Path) -> None:
    root, before = run / "cache/one", digests(run)
    left = leave_things(root)
    report = verify(root)
    assert report.sound and {x.path: x.ours for x in report.leftovers} == left
    assert all(x.bytes == 4 for x in report.leftovers)
    assert plan_repair(report) == []
    repair(report, clean=True)
    assert [x.path for x in verify(root).leftovers] == ["notes.txt"]
    assert not list(root.glob(".*")), "the folder of a half-made group is left"
    (root / "notes.txt").unlink()
    assert digests(run) == before


def test_part_without_manifest_is_not_done_and_not_bad(run: Path) -> None:
    root = run / "cache/one"
    shards = {p.relative_to(root).as_posix() for p in shards_of(root, 1)}
    manifest_of(root, 1).unlink()
    report = verify(root)
    assert report.sound and not report.complete and report.missing == (1,)
    assert {x.path for x in report.leftovers} == shards


@pytest.mark.parametrize("which", [("near_ids", "far_ids"), ("near_ids",), ("far_ids",)])
@pytest.mark.parametrize("where", ["notes.zarr", "spare"])
def test_orders_of_another_cache_are_not_taken_for_this_ones(
    made: Lab, run: Path, cli: Cli, where: str, which: tuple[str, ...]
) -> None:
    """Readable all the same; the manifests tell with which orders the parts were written."""
    root, before = run / "cache/one", digests(run)
    for name in which:
        inner = f"notes.zarr/{name}/c/{'0/0' if name == 'near_ids' else '0'}"
        shutil.copy(
            run / "cache/two" / inner, root / (inner if where != "spare" else f"spare/{name}")
        )
    if where != "spare":  # no part is written with them
        path = manifest_of(root, 1)
        data = path.read_bytes()
        path.unlink()
        result = cli("cache-teachers", made.write("others.yaml", run_dir=str(run)))
        assert result.exit_code == 1 and "not those of the finished parts" in result.output
        path.write_bytes(data)
    report = verify(root)
    assert {p.mend for p in report.problems} == {"restore"} and len(report.problems) == len(which)
    repair(report)
    assert digests(run) == before and verify(root).sound


@pytest.mark.parametrize(
    "name",
    ["cache/one/cache.json", "cache/one/notes.zarr/entropy/zarr.json", "cache/one/spare/far_ids",
     "cache/one/notes.zarr/near_ids/c/0/0", "cache/one/notes.zarr/logprob_levels/c/0",
     "cache/one/manifests", "corpus/corpus.json", "corpus/manifests"],
)  # fmt: skip
def test_what_cannot_be_read_is_one_problem_among_others(
    made: Lab, run: Path, cli: Cli, name: str
) -> None:
    """A directory stands for any file that gives no bytes; the other files are checked all the same."""
    before, path = digests(run), run / name
    path = min(path.iterdir()) if path.is_dir() else path
    root = run / "corpus" if name.startswith("corpus") else run / "cache/one"
    path.unlink()
    path.mkdir()
    (path / "in the way").write_bytes(b"")
    report = verify(root, deep=True)
    found = path.relative_to(root).as_posix()
    assert found in {p.path for p in report.problems}, report.problems
    assert any("cannot be read" in p.what for p in report.problems)
    assert report.checked == verify(run / "cache/two").checked
    config = made.write("directory.yaml", run_dir=str(run))
    for command in ("repair", "cache-teachers", "repair"):
        assert cli(command, config).exit_code == 0
    assert digests(run) == before and cli("verify", config).exit_code == 0


def test_a_teacher_called_corpus_hides_nothing(made: Lab, run: Path, cli: Cli) -> None:
    (run / "cache/two").rename(run / "cache/corpus")
    teachers = {"one": made.config["teachers"]["one"], "corpus": made.config["teachers"]["two"]}
    config = made.write("corpus.yaml", run_dir=str(run), teachers=teachers)
    flip(min((run / "corpus/blocks").iterdir()))
    flip(min((run / "cache/corpus/manifests").iterdir()))
    stores = json.loads(cli("verify", config, "--json", "-q").output)["stores"]
    bad = {name: store["kind"] for name, store in stores.items() if not store["sound"]}
    assert bad == {"corpus": "corpus", "cache/corpus": "cache"} and set(stores) == {"one", *bad}
    assert set(json.loads(cli("verify", run, "--json", "-q").output)["stores"]) == set(stores)


@pytest.mark.parametrize("name", ["corpus", "cache/one"])
def test_manifests_beside_the_right_ones(made: Lab, run: Path, cli: Cli, name: str) -> None:
    """One of another fingerprint, which other commands refuse; one of a part that does not exist."""
    root, before = run / name, digests(run)
    config = made.write("beside.yaml", run_dir=str(run))
    own, parts = manifest_of(root, 1), verify(root).checked
    other, beyond = own.with_name(f"000001-{'f' * 12}.json"), own.name.replace("000001", "000017")
    shutil.copy(own, other)
    shutil.copy(own, own.with_name(beyond))
    report = verify(root)
    found = {p.path.split("/")[1]: p.mend for p in report.problems}
    assert found == {other.name: "none", beyond: "drop"} and report.checked == parts
    assert not report.leftovers
    repair(report)
    assert [p.path.split("/")[1] for p in verify(root).problems] == [other.name]
    other.unlink()
    assert digests(run) == before
    shutil.copy(own, own.with_name(beyond))
    rows = json.loads(cli("status", config, "--json").output)
    assert all(r["done"] == r["total"] for r in rows[:3]), rows


def test_begun_is_held_against_corpus_json(made: Lab, run: Path, cli: Cli) -> None:
    """Read only where corpus.json is lost: then it must be right, so it is checked before."""
    root, before = run / "corpus", digests(run)
    begun = (root / "begun.json").read_bytes()
    for damaged in (b"", begun[:-9], begun.replace(b'"domain":"y"', b'"domain":"x"'), begun + b" "):
        (root / "begun.json").write_bytes(damaged)
        assert [(p.path, p.mend) for p in verify(root).problems] == [("begun.json", "rewrite")]
        assert cli("repair", run).exit_code == 0
        assert digests(run) == before
    (root / "begun.json").unlink()
    flip(shards_of(root, 1)[0])  # repair drops corpus.json: begun.json has to be there first
    actions = repair(verify(root))
    assert [a.path for a in actions[:2]] == ["begun.json", "corpus.json"]
    assert cli("prepare", made.write("begun.yaml", run_dir=str(run))).exit_code == 0
    assert digests(run) == before


def test_a_grown_corpus_without_its_records_is_not_given_up(made: Lab, run: Path, cli: Cli) -> None:
    config, root = grown(made, run), run / "corpus"
    assert cli("append", config).exit_code == 0
    (root / "corpus.json").unlink()
    (root / "begun.json").unlink()
    result = cli("prepare", config)
    assert result.exit_code == 1 and "delete" not in result.output, result.output
    assert "both lost" in result.output


def test_folders_of_killed_writers_are_left_over(run: Path) -> None:
    """Made before the first file is: nothing but folders."""
    root, name = run / "cache/one", ".000001.0123456789abcdef0123456789abcdef.tmp"
    (root / name / "notes.zarr/entropy/c/1").mkdir(parents=True)
    (root / name / "notes.zarr/id_class/c").mkdir(parents=True)
    report = verify(root)
    assert report.sound and [(x.path, x.ours) for x in report.leftovers] == [(name, True)]
    assert [a.path for a in plan_repair(report, clean=True)] == [name]
    (root / name / "notes.zarr/entropy/c/1/0").write_bytes(b"some")  # as if killed later
    repair(verify(root), clean=True)
    assert not (root / name).exists() and not verify(root).leftovers


def test_what_to_do_is_what_can_be_typed(made: Lab, run: Path, cli: Cli) -> None:
    config, given = made.write("typed.yaml"), f"run_dir={run}"
    flip(shards_of(run / "cache/one", 1)[0])
    told = cli("verify", config, "--set", given).output
    assert f"to do: scholiast repair {config} --set {given}" in told
    told = cli("repair", config, "--set", given, "--dry-run").output
    assert f"to do: scholiast cache-teachers {config} --set {given}" in told
    told = cli("repair", run, "--dry-run").output
    assert "cache-teachers with the run's configuration" in told and "CONFIG" not in told
    assert "no such folder" in cli("verify", run / "nowhere").output


def test_threads_find_the_same(run: Path) -> None:
    root = run / "cache/one"
    for path in shards_of(root, 1)[::2]:
        flip(path)

    def found(report: Report) -> list[Any]:
        return [report.problems, report.missing, report.leftovers, report.objects, report.bytes]

    assert found(verify(root, workers=1)) == found(verify(root, workers=8))
    assert len(verify(root).problems) == len(shards_of(root, 1)[::2])
