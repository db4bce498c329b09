"""Tokenizers: loading, and whether two of them turn every text into the same ids.

Two tokenizers agree if they share vocabulary, merges, normaliser and pre-tokeniser, and no id means
two things. Chat templates, padding, and ids that only one of them has beyond the other's may differ:
they change no id of a text that is already tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.model_safety import first_line, require_plain, todo_of
from storage.errors import CorpusError, TeacherError, VocabularyMismatch
from storage.fingerprint import fingerprint


def load_tokenizer(folder: Path, key: str, *, trust_remote_code: bool = False) -> Any:
    """Returns the folder's fast tokenizer.

    Raises:
        TeacherError: none there, it cannot give offsets, or it names files to read in place of its own.
    """
    from transformers import AutoTokenizer

    require_plain(folder, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain ones
        raise TeacherError(
            f"the tokenizer cannot be loaded: {first_line(error)}", where=f"{key}: {folder}",
            todo=todo_of(error, "save the tokenizer beside the model"),
        ) from error  # fmt: skip
    if not tokenizer.is_fast:
        raise TeacherError(
            "the tokenizer has no fast version, so it cannot say which bytes a token covers",
            where=f"{key}: {folder}", todo="convert it to a tokenizer.json",
        )  # fmt: skip
    return tokenizer


def vocab_size(tokenizer: Any) -> int:
    """Returns V: the largest id the tokenizer knows, plus one. Models may have padding rows beyond."""
    return int(max(tokenizer.get_vocab().values())) + 1


def rules(tokenizer: Any) -> dict[str, Any]:
    """Returns what decides which ids a text becomes, apart from special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: state.get(key) for key in ("normalizer", "pre_tokenizer", "model")}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Returns the fingerprint of rules and vocabulary."""
    return fingerprint({"rules": rules(tokenizer), "vocabulary": tokenizer.get_vocab()})


def require_same_tokenizer(ours: Any, theirs: Any, our_name: str, their_name: str) -> None:
    """Refuses a model whose tokenizer would give other ids.

    Args:
        ours, theirs: fast tokenizers; names are for the message.

    Raises:
        VocabularyMismatch: says the first id, or the rule, on which the two disagree.
    """
    todo = (
        "use teachers and a student of one tokenizer family; "
        "joining different tokenizers is not supported"
    )
    a = {i: t for t, i in ours.get_vocab().items()}
    b = {i: t for t, i in theirs.get_vocab().items()}
    for index in sorted(a):
        if a[index] != b.get(index):
            raise VocabularyMismatch(
                f"{their_name} has another tokenizer than {our_name}: "
                f"{len(b):,} entries against {len(a):,}",
                where=f"token id {index}", expected=repr(a[index]), found=repr(b.get(index)),
                todo=todo,
            )  # fmt: skip
    ours_rules, theirs_rules = rules(ours), rules(theirs)
    for key, rule in ours_rules.items():
        if fingerprint(rule) != fingerprint(theirs_rules[key]):
            raise VocabularyMismatch(
                f"{their_name} has the vocabulary of {our_name} but cuts text differently",
                where=f"tokenizer.json: {key}", expected=_brief(rule),
                found=_brief(theirs_rules[key]), todo=todo,
            )  # fmt: skip


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 160 else f"{text[:150]}… (fingerprint {fingerprint(value)[:12]})"


def eos_id(tokenizer: Any, key: str) -> int:
    """Returns the id that ends a document.

    Raises:
        CorpusError: the tokenizer names none.
    """
    if tokenizer.eos_token_id is None:
        raise CorpusError(
            "the tokenizer has no end-of-sequence token", where=key,
            todo="set corpus.append_eos=false, or name an eos_token in tokenizer_config.json",
        )  # fmt: skip
    return int(tokenizer.eos_token_id)
