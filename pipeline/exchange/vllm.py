"""Dumps of vLLM's `prompt_logprobs`, a line a request or a response of its OpenAI-compatible server.

    {"prompt_token_ids": [5, 9, 2], "prompt_logprobs": [null, {"9": {"logprob": −0.1, "rank": 1,
     "decoded_token": " a"}, …}, …]}

Entry i is the distribution of the prompt's token i, given those before it; the first is null. Each holds
the k most probable tokens and the actual one, k + 1 where that is none of them. Ids and entries stand in
the row (a `RequestOutput`, a chat completion) or in each of `choices` (a completion).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.exchange.captured import CapturedSequence, Reading, refuse
from pipeline.exchange.topk_jsonl import json_lines, parse_entries, sequence_tokens
from storage.types import Int32

_IDS = ("prompt_token_ids", "token_ids", "input_ids")
_TEXTS = ("prompt", "text")


def read_vllm(files: Sequence[Path], reading: Reading) -> Iterator[CapturedSequence]:
    """Yields the prompts of JSON-lines dumps.

    Raises:
        CorruptShard, ConfigError
    """
    for path in files:
        for where, row in json_lines(path):
            found = list(_prompts(row))
            if not found:
                raise refuse(
                    "the line has no prompt_logprobs", where, expected="prompt_logprobs: […]"
                )
            for one, outer in found:
                yield _sequence(one, outer, reading, where)


def _prompts(row: Any) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yields (what holds prompt_logprobs, what holds it)."""
    if not isinstance(row, Mapping):
        return
    if isinstance(row.get("prompt_logprobs"), list):
        yield row, row
        return
    choices = row.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, Mapping) and isinstance(choice.get("prompt_logprobs"), list):
            yield choice, row


def _sequence(
    row: Mapping[str, Any], outer: Mapping[str, Any], reading: Reading, where: str
) -> CapturedSequence:
    told = row if any(key in row for key in (*_IDS, *_TEXTS[:1])) else outer
    tokens: Int32 = sequence_tokens(told, _IDS, reading, where, _TEXTS)
    entries = row["prompt_logprobs"]
    if len(entries) != len(tokens):
        raise refuse(
            "another number of entries than the prompt has tokens: another tokenizer, or a cut dump",
            where, expected=len(tokens), found=len(entries),
        )  # fmt: skip
    ids, values, counts = parse_entries(entries, reading, where)
    return CapturedSequence(where, tokens, reading.offset, counts, ids, values)
