"""Prompts, continuations, their scores, and the bytes of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab, make_model, make_tokenizer, sentences
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from stages.bootstrap import interval, resampled
from stages.generation import choose_prompts, continue_prompts
from stages.text_bytes import added_space, id_bytes, target_bytes
from stages.text_scores import Continuation, text_scores
from storage.blocks import BlockReader
from storage.types import TokenBlocks

TEXTS = [*sentences(12, 11), "  two spaces\n\ttab 漢🍵", "naïve", "🍵🍵🍵"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    torch.set_num_threads(1)  # so small a model is slowed by more
    return make_model(tmp_path_factory.mktemp("model"), len(tokenizer), 3)


# -- bytes


def metaspace(prefix: str) -> Any:
    """A tokenizer of the SentencePiece kind: "▁" for spaces, bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.", "▁the", "qu", "▁b", "▁▁"]
    names = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges = [("q", "u"), ("▁", "b"), ("▁", "▁")]
    core = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, merges, byte_fallback=True, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=prefix)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def test_a_documents_bytes_are_those_of_its_tokens(tokenizer: Any) -> None:
    sizes = id_bytes(tokenizer)
    assert sizes is not None and added_space(tokenizer, sizes) == 0
    split = 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert sizes[ids].sum() == len(text.encode())
        split += sum("\ufffd" in tokenizer.decode([i]) for i in ids)
    assert split, "no character was cut between tokens: the case was not tried"
    assert sizes[tokenizer.eos_token_id] == 0


@pytest.mark.parametrize(("prefix", "space"), [("first", 1), ("never", 0)])
def test_so_it_is_with_metaspace_and_bytes(prefix: str, space: int) -> None:
    tokenizer = metaspace(prefix)
    sizes = id_bytes(tokenizer)
    assert sizes is not None and added_space(tokenizer, sizes) == space
    for text in ["the quick", "a  b", "naïve 漢字 🍵\n"]:
        ids = tokenizer(text)["input_ids"]
        assert sizes[ids].sum() == len(text.encode()) + space
    # Behind a BOS the first token of the text is a target, and the added space is not counted.
    ids = np.array([[1, *tokenizer("the quick")["input_ids"]]], np.int32)
    mapping = tokenizer("the quick", return_offsets_mapping=True)["offset_mapping"]
    offset = np.array([[0, *(start for start, _ in mapping)]])
    ones = np.ones_like(ids, bool)
    blocks = TokenBlocks(np.zeros(1, np.int64), ids, np.zeros_like(offset), offset, ones)
    assert target_bytes(blocks, sizes, space).tolist() == [len("the quick")]


def test_word_pieces_do_not_say_their_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    assert id_bytes(PreTrainedTokenizerFast(tokenizer_object=core)) is None


def test_blocks_count_the_bytes_of_their_scored_targets(lab: Lab) -> None:
    """Every byte of the corpus but those of each document piece's first token, each once."""
    work = lab.workspace()
    info = work.prepare()
    corpus, tokenizer = BlockReader(work.config.corpus_folder), work.tokenizer()
    sizes = id_bytes(tokenizer)
    assert sizes is not None
    blocks = corpus.read(info.block_ids("heldout"))
    counted = target_bytes(blocks, sizes, 0)
    inputs, positions = blocks.tokens, np.zeros(blocks.tokens.shape, bool)
    positions[:, 1:] = blocks.scored
    texts = [tokenizer.convert_ids_to_tokens(row[at].tolist()) for row, at in zip(
        inputs, positions, strict=True)]  # fmt: skip
    assert counted.tolist() == [sum(len(t) for t in row if t != "<eos>") for row in texts]


# -- prompts and continuations


def test_prompts_are_whole_stretches_of_one_document(lab: Lab) -> None:
    work = lab.workspace()
    info = work.prepare()
    corpus = BlockReader(work.config.corpus_folder)
    end = work.tokenizer().eos_token_id
    blocks = corpus.read(info.block_ids("heldout", "x"))
    documents: dict[int, list[int]] = {}
    for tokens, numbers in zip(blocks.inputs, blocks.document[:, :-1], strict=True):
        for token, number in zip(tokens.tolist(), numbers.tolist(), strict=True):
            documents.setdefault(number, []).append(token)
    texts = [" ".join(map(str, ids)) for number, ids in documents.items() if number >= 0]
    everything = choose_prompts(corpus, "x", 10_000, 4, 4, end)
    assert len(everything) > 6
    for prompt in everything:
        assert (len(prompt.tokens), len(prompt.following)) == (4, 4) and prompt.domain == "x"
        assert end not in prompt.tokens + prompt.following
        joined = " ".join(map(str, prompt.tokens + prompt.following))
        assert any(joined in text for text in texts)
    some = choose_prompts(corpus, "x", 3, 4, 4, end)
    assert some == choose_prompts(corpus, "x", 3, 4, 4, end)
    places = [everything.index(prompt) for prompt in some]
    assert places == [0, len(everything) // 3, 2 * len(everything) // 3]
    assert choose_prompts(corpus, "x", 3, 30, 30, end) == []


def plain_greedy(network: Any, prompt: list[int], new_tokens: int, end: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            token = int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == end:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_greedy_continuations_are_the_most_probable_ids(network: Any, tokenizer: Any) -> None:
    prompts = [tokenizer("the quick brown fox " + word)["input_ids"][:5] for word in "abcdefgh"]
    prompts = [[*p[:4], 10 + i] for i, p in enumerate(prompts)]
    found = continue_prompts(network, tokenizer, prompts, 12, 0.0, 0)
    end = tokenizer.eos_token_id
    assert found == [plain_greedy(network, p, 12, end) for p in prompts]
    assert network.generation_config.max_new_tokens is None


def test_a_continuation_ends_before_the_end_of_document(network: Any, tokenizer: Any) -> None:
    prompt = [20, 21, 22]
    free = plain_greedy(network, prompt, 12, -1)
    own = network.generation_config
    network.generation_config = type(own)(eos_token_id=free[5], repetition_penalty=9.0)
    try:
        [found] = continue_prompts(network, tokenizer, [prompt], 12, 0.0, 0)
    finally:
        network.generation_config = own
    assert found == free[: free.index(free[5])], "and the model's own penalty is left out"


def test_sampling_is_seeded_and_follows_the_temperature(network: Any, tokenizer: Any) -> None:
    prompts = [[20, 21, 22 + i] for i in range(40)]  # more than one batch

    def sample(temperature: float, seed: int) -> list[list[int]]:
        return continue_prompts(network, tokenizer, prompts, 8, temperature, seed)

    assert sample(1.0, 3) == sample(1.0, 3) != sample(1.0, 4)
    assert sample(1e-4, 3) == continue_prompts(network, tokenizer, prompts, 8, 0.0, 0)


# -- scores


def written(count: int, seed: int, domain: str = "x") -> list[Continuation]:
    texts, references = sentences(count, seed), sentences(count, seed + 1)
    return [
        Continuation(domain, [ord(c) for c in text], f"{text[:20]} {reference[:30]}", reference)
        for text, reference in zip(texts, references, strict=True)
    ]


def test_scores_are_sacrebleus_and_rouges() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    x, y = written(7, 1), written(5, 9, "y")
    found = text_scores([*x, *y], 0, 0)
    for name, group in {"x": x, "y": y, "overall": [*x, *y]}.items():
        texts, references = [c.text for c in group], [[c.reference for c in group]]
        assert found[name]["bleu"] == pytest.approx(BLEU().corpus_score(texts, references).score)
        assert found[name]["chrf"] == pytest.approx(CHRF().corpus_score(texts, references).score)
        rouge = [RougeScorer(["rougeL"]).score(c.reference, c.text)["rougeL"][2] for c in group]
        assert found[name]["rouge_l"] == pytest.approx(np.mean(rouge))
        assert found[name]["intervals"] == {}
    assert found["overall"]["bleu"] > 5


def test_intervals_are_those_of_scores_computed_anew() -> None:
    group = written(6, 5)
    found = text_scores(group, 30, 2)["x"]["intervals"]
    counts = resampled(np.eye(6), 30, 2).astype(int)
    bleu = []
    for row in counts:
        drawn = [group[i] for i in np.repeat(np.arange(6), row)]
        references = [[c.reference for c in drawn]]
        bleu.append(BLEU().corpus_score([c.text for c in drawn], references).score)
    assert found["bleu"] == pytest.approx(interval(np.array(bleu)))
    assert set(found) == {"bleu", "chrf", "rouge_l"}


def test_distinct_counts_different_grams_over_tokens() -> None:
    ids = [[1, 2, 1, 2], [1, 2, 3], []]
    found = text_scores([Continuation("x", one, "a", "a") for one in ids], 0, 0)["x"]
    assert found["distinct_1"] == pytest.approx(3 / 7)  # 1, 2, 3
    assert found["distinct_2"] == pytest.approx(3 / 7)  # 12, 21, 23


def test_nothing_written_is_no_failure() -> None:
    empty = text_scores([Continuation("x", [], "", "the quick")], 10, 0)["overall"]
    assert (empty["bleu"], empty["rouge_l"], empty["distinct_1"]) == (0.0, 0.0, 0.0)
    assert text_scores([], 10, 0) == {}
