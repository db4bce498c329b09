"""Held-out figures of teachers, ensemble and students, and samples of what the students write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.report import read_metrics
from pipeline.workspace import BEFORE, Workspace
from stages.teacher_jobs import TeacherJob
from storage.blocks import CorpusInfo

if TYPE_CHECKING:
    import torch

    from stages.run import Run


def evaluate(
    work: Workspace, info: CorpusInfo, jobs: list[TeacherJob], runs: dict[str, Run]
) -> dict[str, Any]:
    """Returns everything of evaluation.json that is measured (see report.py for its shape)."""
    import torch

    from pipeline.token_view import token_view
    from stages.batches import BatchReader
    from stages.device import choose_device
    from stages.evaluate import heldout_losses, teacher_perplexities
    from stages.student import DistilledStudent

    device = choose_device(work.config.device)
    reader: BatchReader = work.batch_reader()
    heldout = info.block_ids("heldout")
    tables = teacher_perplexities(reader, heldout)
    prompts = sample_prompts(work, reader, info)
    students: dict[str, Any] = {}
    tokens = token_view(work, reader, heldout)
    work.progress.start("evaluate", len(runs) + 1, "model")
    for name, model in _models(work, runs, device):
        bf16 = work.config.train.precision == "bf16"
        module = DistilledStudent(model, work.config.loss, bf16)
        students[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "domains": heldout_losses(module, reader, heldout, work.config.evaluate.batch_blocks),
        }
        tokens.add_student(name, model)
        for prompt in prompts:
            prompt["continuations"][name] = continue_text(work, model, prompt["tokens"])
        work.progress.advance(1)
    work.progress.finish()
    return {
        "device": str(device), "threads": torch.get_num_threads(),
        "corpus": {
            "tokens": info.tokens, "blocks": info.blocks, "block_length": info.block_length,
            "vocab_size": info.vocab_size, "sources": [vars(source) for source in info.sources],
        },
        "domains": list(info.domains),
        "teachers": {n: t for n, t in tables.items() if n != "fused" and t},
        "fused": tables["fused"],
        "students": students,
        "samples": [{k: v for k, v in p.items() if k != "tokens"} for p in prompts],
        "tokens": tokens.as_json(), "cache": work.cache_costs(jobs),
        "training": {name: training_cost(run, str(device)) for name, run in runs.items()},
    }  # fmt: skip


def _models(
    work: Workspace, runs: dict[str, Run], device: torch.device
) -> Iterator[tuple[str, Any]]:
    """Yields the student before training and each trained one; never two in memory."""
    import torch

    from stages.student import build_student
    from stages.teacher import load_causal_lm

    options = work.config.student
    bare = options.model_copy(update={"lora": None})  # new adapters change nothing
    yield BEFORE, build_student(bare, work.student_folder(), device, work.config.train.seed)
    for name, run in runs.items():
        yield (
            name,
            load_causal_lm(
                run.model_folder, f"student {name}", dtype=torch.float32,
                attention=options.attention, device=device,
                trust_remote_code=options.trust_remote_code,
            ),
        )  # fmt: skip


def sample_prompts(work: Workspace, reader: Any, info: CorpusInfo) -> list[dict[str, Any]]:
    """Returns the first tokens of held-out blocks of each domain, and the text that follows them."""
    from stages.tokenizer import load_tokenizer

    options = work.config.evaluate
    tokenizer = load_tokenizer(work._tokenizer_folder(), "corpus.tokenizer")
    prompts = []
    for domain in info.domains:
        for block in info.block_ids("heldout", domain)[: options.samples]:
            blocks = reader.corpus.read([int(block)])
            mine = blocks.inputs[0][blocks.document[0, :-1] == blocks.document[0, 0]].tolist()
            prompt, rest = mine[: options.prompt_tokens], mine[options.prompt_tokens :]
            prompts.append(
                {
                    "domain": domain, "tokens": prompt, "prompt": tokenizer.decode(prompt),
                    "reference": tokenizer.decode(rest[: options.new_tokens]), "continuations": {},
                }
            )  # fmt: skip
    return prompts


def continue_text(work: Workspace, model: Any, tokens: list[int]) -> str:
    """Returns the model's greedy continuation of a prompt, as text without special tokens."""
    from stages.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(work._tokenizer_folder(), "corpus.tokenizer")
    return generate(model, tokenizer, tokens, work.config.evaluate.new_tokens, 0.0, 0)


def generate(
    model: Any, tokenizer: Any, tokens: list[int], new_tokens: int, temperature: float, seed: int
) -> str:
    """Returns what a causal LM writes after a prompt.

    Args:
        temperature: 0 is greedy.
        seed: of the sampling.
    """
    import torch

    torch.manual_seed(seed)
    ids = torch.tensor([tokens], device=model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    model.eval()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **(sampling if temperature else greedy),
        )  # fmt: skip
    text: str = tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True)
    return text


def training_cost(run: Run, device: str) -> dict[str, Any]:
    """Returns steps, tokens, seconds and memory of a training, over all its resumed stretches."""
    rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if "seconds" in row]
    tokens, seconds = (rows[-1]["tokens"], rows[-1]["seconds"]) if rows else (0, 0.0)
    return {
        "steps": run.steps, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_bytes": max((row["peak_bytes"] for row in rows), default=None), "device": device,
    }  # fmt: skip
