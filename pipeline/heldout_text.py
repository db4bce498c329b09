"""What models are asked to continue, and what they write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.workspace import Workspace
from storage.corpus_info import CorpusInfo
from storage.types import Int64

if TYPE_CHECKING:
    from stages.batches import BatchReader
    from stages.generation import Prompt
    from stages.text_scores import Continuation


@dataclass(frozen=True)
class HeldoutText:
    """What is asked of every model alike, besides the blocks.

    Attributes:
        tokenizer: the corpus's.
        prompts: of all domains.
        target_bytes: int64 [N], bytes of each held-out block's scored targets; None where the tokenizer
            does not say.
        shown: index of each prompt that the report shows → its sample, with what each model wrote.
    """

    tokenizer: Any
    prompts: list[Prompt]
    target_bytes: Int64 | None
    shown: dict[int, dict[str, Any]] = field(default_factory=dict)


def sample_prompts(work: Workspace, reader: BatchReader, info: CorpusInfo) -> HeldoutText:
    """Returns the prompts of each domain, and the bytes of the held-out blocks' targets."""
    from stages.generation import choose_prompts
    from stages.text_bytes import added_space, id_bytes, target_bytes

    options, tokenizer = work.config.evaluate, work.tokenizer()
    corpus, end = reader.corpus, tokenizer.eos_token_id
    count, sizes = max(options.prompts, options.samples), id_bytes(tokenizer)
    prompts: list[Prompt] = []
    shown: dict[int, dict[str, Any]] = {}
    for domain in info.domains if count else ():
        found = choose_prompts(
            corpus, domain, count, options.prompt_tokens, options.new_tokens, end
        )
        for i, prompt in enumerate(found[: options.samples], start=len(prompts)):
            shown[i] = {
                "domain": domain, "prompt": tokenizer.decode(prompt.tokens),
                "reference": tokenizer.decode(prompt.following), "continuations": {},
            }  # fmt: skip
        prompts += found
    if sizes is None:
        return HeldoutText(tokenizer, prompts, None, shown)
    space, heldout = added_space(tokenizer, sizes), info.block_ids("heldout").tolist()
    counted = [int(target_bytes(corpus.read([block]), sizes, space)[0]) for block in heldout]
    return HeldoutText(tokenizer, prompts, np.array(counted, np.int64), shown)


def continuations(
    work: Workspace, model: Any, prompts: HeldoutText, temperature: float
) -> list[Continuation]:
    """Returns what the model writes after every prompt; temperature 0 is greedy."""
    from stages.generation import continue_prompts
    from stages.text_scores import Continuation

    options, tokenizer = work.config.evaluate, prompts.tokenizer
    ids = continue_prompts(
        model, tokenizer, [prompt.tokens for prompt in prompts.prompts], options.new_tokens,
        temperature, options.seed,
    )  # fmt: skip
    return [
        Continuation(
            prompt.domain, new, tokenizer.decode(new, skip_special_tokens=True),
            tokenizer.decode(prompt.following, skip_special_tokens=True),
        )
        for prompt, new in zip(prompts.prompts, ids, strict=True)
    ]  # fmt: skip


def generate(
    model: Any, tokenizer: Any, tokens: list[int], new_tokens: int, temperature: float, seed: int
) -> str:
    """Returns what a causal LM writes after a prompt, as text without special tokens.

    Args:
        temperature: 0 is greedy.
        seed: of the sampling.
    """
    from stages.generation import continue_prompts

    [ids] = continue_prompts(model, tokenizer, [tokens], new_tokens, temperature, seed)
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
