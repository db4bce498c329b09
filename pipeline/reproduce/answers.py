"""What a student answers to the instruction task, compared with the docstring it was to give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.reproduce.instructions import DOMAIN
from pipeline.workspace import Workspace
from storage.blocks import BlockReader

if TYPE_CHECKING:
    from stages.generation import Prompt


def answer_scores(work: Workspace, model: Any, corpus: BlockReader) -> dict[str, float]:
    """Returns BLEU, ROUGE-L and distinct-1 of greedy answers, {} where the corpus has no such task."""
    if DOMAIN not in corpus.info.domains:
        return {}
    from stages.generation import continue_prompts
    from stages.text_scores import Continuation, text_scores

    options, tokenizer = work.config.evaluate, work.tokenizer()
    written = []
    for prompt in questions(corpus, options.prompts):  # of different lengths: one at a time
        [ids] = continue_prompts(model, tokenizer, [prompt.tokens], options.new_tokens, 0.0, 0)
        text, truth = (
            tokenizer.decode(each, skip_special_tokens=True) for each in (ids, prompt.following)
        )
        written.append(Continuation(DOMAIN, ids, text, truth))
    if not written:
        return {}
    found = text_scores(written, 0, 0)[DOMAIN]
    return {
        f"answer_{name}/{DOMAIN}": float(found[name]) for name in ("bleu", "rouge_l", "distinct_1")
    }


def questions(corpus: BlockReader, count: int) -> list[Prompt]:
    """Returns the first held-out chats that lie in one block whole, up to where the answer begins."""
    from stages.generation import Prompt

    found = []
    for block in corpus.info.block_ids("heldout", DOMAIN):
        blocks = corpus.read([int(block)])
        inputs, document = blocks.inputs[0], blocks.document[0, :-1]
        gold, scored = blocks.gold[0], blocks.scored[0]
        for number in np.unique(document[scored]):
            rows = np.flatnonzero(document == number)
            answer = rows[scored[rows]]
            # What begins or ends with the block may have lost a part to another.
            if rows[0] > 0 and rows[-1] + 1 < len(inputs):
                found.append(
                    Prompt(DOMAIN, inputs[rows[0] : answer[0] + 1].tolist(), gold[answer].tolist())
                )
    return found[:count]
