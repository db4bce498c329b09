"""Licences as files state them, llama.cpp's command, and cards that someone has edited."""

from __future__ import annotations

import json
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
