"""Licences as files state them, llama.cpp's command, and cards that someone has edited."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.gguf import conversion
from pipeline.licences import NOT_STATED, Licence, stated
from pipeline.model_card import refresh
from storage.fingerprint import bytes_sha256

README = "---\nlicense: {}\n---\n# A model\n"


def folder_of(root: Path, **files: str) -> Path:
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Licence()),
        ({"README__md": README.format("apache-2.0"), "LICENSE": "MIT License"},
         Licence("apache-2.0", "README.md", True)),
        ({"README__md": "---\nlicense: other\nlicense_name: llama-4\n---\n"},
         Licence("llama-4", "README.md")),
        ({"README__md": README.format("[mit, apache-2.0]")}, Licence("mit, apache-2.0", "README.md")),
        ({"README__md": README.format("[unclosed"), "config__json": '{"license": "mit"}'},
         Licence("mit", "config.json", True)),
        ({"README__md": "# no front matter\nlicense: mit\n", "LICENSE__md": "\n# MIT License\n"},
         Licence("MIT License", "LICENSE.md")),
        ({"config__json": "[]", "LICENSE": ""}, Licence("LICENSE", "LICENSE")),
    ],
)  # fmt: skip
def test_a_licence_is_what_the_files_state(
    tmp_path: Path, files: dict[str, str], expected: Licence
) -> None:
    assert stated(folder_of(tmp_path, **files)) == expected
    assert stated(tmp_path / "nowhere").name == NOT_STATED


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 7)
)
HOSTILE = {
    "a date that is none": "---\nlicense: mit\nreleased: 2024-02-30\n---\n",
    "deep": "---\nlicense: " + "[" * 3000 + "\n---\n",
    "aliases": f"---\n{ALIASES}license: [*a6]\n---\n",
    "lines": "---" + "\n" * 500_000 + "x",
    "dashes and spaces": "---" + " \n" * 300_000 + "x",
    "base 60": "---\nlicense: 1" + ":1" * 500_000 + "\n---\n",
}


@pytest.mark.parametrize("readme", HOSTILE.values(), ids=HOSTILE)
def test_what_a_readme_holds_ends_no_export(tmp_path: Path, readme: str) -> None:
    """The card is made when the training is over."""
    began = time.process_time()
    folder = folder_of(tmp_path, README__md=readme, config__json="[" * 200_000, LICENSE="MIT")
    assert stated(folder) == Licence("MIT", "LICENSE")
    assert time.process_time() - began < 20


def test_a_licence_is_a_name_of_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, README__md='---\nlicense: "a\\n# b' + "c" * 500 + '"\n---\n')
    assert stated(folder) == Licence(f"a # b{'c' * 75}", "README.md")


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "config.json"])
def test_no_file_outside_the_model_gets_into_a_card(tmp_path: Path, name: str) -> None:
    """A card is published: a model must not be able to name a file of ours in it."""
    texts = {
        "LICENSE": "MIT",
        "README.md": README.format("mit"),
        "config.json": '{"license": "mit"}',
    }
    secret, folder = tmp_path / "secret", tmp_path / "model"
    folder.mkdir()
    secret.write_text(texts[name])
    for target in (secret, Path("../secret"), tmp_path / "loop/../secret"):
        (folder / name).symlink_to(target)
        assert stated(folder) == Licence()
        (folder / name).unlink()
    (folder / name).symlink_to(name)  # to itself
    assert stated(folder) == Licence()
    (folder / name).unlink()
    os.mkfifo(folder / name)  # nobody writes into it
    assert stated(folder) == Licence()
    (folder / name).unlink()
    (folder / "own").write_text(texts[name])
    (folder / name).symlink_to("own")
    assert stated(folder).source == name


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(tmp_path: Path) -> None:
    model = tmp_path / "hub/models--org--name"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs/1").write_text(README.format("apache-2.0"))
    (snapshot / "README.md").symlink_to("../../blobs/1")
    assert stated(snapshot) == Licence("apache-2.0", "README.md", True)
    (tmp_path / "hub/secret").write_text(README.format("mit"))
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../../secret")
    assert stated(snapshot) == Licence()


def test_the_command_for_llama_cpp(tmp_path: Path) -> None:
    said = {"architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
    folder = folder_of(tmp_path, config__json=json.dumps(said))
    told = conversion(folder, "my models/a", "a")
    assert told == (
        "Qwen2ForCausalLM",
        "python convert_hf_to_gguf.py 'my models/a' --outfile a.gguf --outtype bf16",
    )
    folder_of(tmp_path, config__json='{"architectures": ["NewForCausalLM"]}')
    assert conversion(folder, "a", "a") == ("NewForCausalLM", None)


def test_a_card_that_was_edited_stays(tmp_path: Path) -> None:
    def card(text: str) -> str:
        return f"{text}<!-- scholiast {bytes_sha256(text.encode())} -->\n"

    path = tmp_path / "README.md"
    assert refresh(tmp_path, lambda folder: card("one\n")) and "one" in path.read_text()
    assert refresh(tmp_path, lambda folder: card("two\n")) and "two" in path.read_text()
    path.write_text(path.read_text().replace("two", "two, by hand"))
    assert not refresh(tmp_path, lambda folder: card("three\n"))
    assert path.read_text().startswith("two, by hand")
    path.write_text("entirely by hand\n")
    assert not refresh(tmp_path, lambda folder: card("three\n"))
