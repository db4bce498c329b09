"""Held-out figures of teachers, ensemble and students, and samples of what the models write.

Losses of the teachers come from the caches. To write text each teacher is loaded once, after the other
models are gone: never two in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import BASELINE, BEFORE, FUSED
from pipeline.heldout_text import HeldoutText, continuations, sample_prompts
from pipeline.reporting.report import read_metrics
from pipeline.reporting.token_view import token_view
from pipeline.workspace import Workspace
from stages.teacher_jobs import TeacherJob
from storage.corpus_info import CorpusInfo
from storage.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from stages.batches import BatchReader
    from stages.evaluate import Sums
    from stages.run import Run
    from stages.text_scores import Continuation


def evaluate(
    work: Workspace, info: CorpusInfo, jobs: list[TeacherJob], runs: dict[str, Run],
    models: Mapping[str, Path],
) -> dict[str, Any]:  # fmt: skip
    """Returns everything of evaluation.json that is measured (see pipeline/README.md for its shape).

    Args:
        models: further students, name → folder; their tokenizers are the corpus's.

    Raises:
        VocabularyMismatch, ConfigError: one of these does not fit the corpus.
    """
    import torch

    from stages.device import choose_device

    device = choose_device(work.config.device)
    reader = work.heldout_reader()
    prompts = sample_prompts(work, reader, info)
    # A teacher is loaded for its text; without prompts its notes say all that is asked.
    # Of an imported cache there is no model.
    teachers = [
        job for job in jobs if job.name in reader.caches and prompts.prompts and not job.imported
    ]
    work.progress.start("evaluate", len(runs) + 1 + len(models) + len(teachers), "model")
    cached = cached_figures(work, reader, info, prompts)
    students: dict[str, Any] = {}
    by_block: dict[str, Sums] = {}
    tokens = token_view(work, reader, info.block_ids("heldout"))
    for name, model in _students(work, runs, models, device, jobs):
        students[name], written, by_block[name] = _figures(work, model, reader, info, prompts)
        _show(prompts, name, written)
        tokens.add_student(name, model)
        del model
        work.progress.advance(1)
    loaded = {job.name: _teacher(work, job, reader, info, prompts, device) for job in teachers}
    work.progress.finish()
    return {
        "device": str(device), "threads": torch.get_num_threads(),
        "corpus": {
            "tokens": info.tokens, "blocks": info.blocks, "block_length": info.block_length,
            "vocab_size": info.vocab_size, "sources": [vars(source) for source in info.sources],
        },
        "domains": list(info.domains),
        "teachers": {name: table for name, table in cached["teachers"].items() if table},
        "fused": cached["fused"],
        "teacher_models": loaded,
        "students": {name: students[name] for name in (BEFORE, *runs, *models)},
        "fused_less_baseline": _fused_less_baseline(work, info, by_block),
        "samples": list(prompts.shown.values()),
        "tokens": tokens.as_json(),
        "cache": work.cache_costs(jobs),
        "training": {name: training_cost(run, str(device)) for name, run in runs.items()},
    }  # fmt: skip


def _fused_less_baseline(
    work: Workspace, info: CorpusInfo, by_block: Mapping[str, Sums]
) -> dict[str, Any] | None:
    """Returns the difference of the two students' held-out losses, None without both."""
    from stages.evaluate import loss_difference

    if not {FUSED, BASELINE} <= set(by_block):
        return None
    options, heldout = work.config.evaluate, info.block_ids("heldout")
    return loss_difference(
        by_block[FUSED], by_block[BASELINE], info, heldout, options.resamples, options.seed
    )


def student_figures(
    work: Workspace, model: Any, reader: BatchReader, info: CorpusInfo, prompts: HeldoutText
) -> dict[str, Any]:
    """Returns the held-out figures of one student.

    Args:
        model: a causal LM with the corpus's tokenizer.
        reader: with caches, of which `work.config.loss` decides what the distillation loss is.
        prompts: what `sample_prompts` gave.

    Returns:
        parameters; domains: domain or "overall" → rows, ce, kd, perplexity, bits_per_byte, accuracy,
        agreement, ece, intervals; generation: domain or "overall" → greedy and sampled, each bleu, chrf,
        rouge_l, distinct_1, distinct_2, intervals; tokens_per_s, of a forward.
    """
    return _figures(work, model, reader, info, prompts)[0]


def _figures(
    work: Workspace, model: Any, reader: BatchReader, info: CorpusInfo, prompts: HeldoutText
) -> tuple[dict[str, Any], list[Continuation], Sums]:
    """Returns what `student_figures` does, the greedy continuations, and the sums of each block."""
    from stages.evaluate import forward_speed, heldout_sums, table
    from stages.student import DistilledStudent

    options, heldout = work.config.evaluate, info.block_ids("heldout")
    bf16 = work.config.train.precision == "bf16"
    module = DistilledStudent(model, work.config.loss, bf16)
    sums = heldout_sums(module, reader, heldout, options.batch_blocks)
    sums = sums.with_bytes(prompts.target_bytes)
    generation, greedy = _generation(work, model, prompts)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "domains": table(sums, info, heldout, options.resamples, options.seed),
        "generation": generation,
        "tokens_per_s": forward_speed(model, reader, heldout, options.batch_blocks, bf16),
    }, greedy, sums  # fmt: skip


def cached_figures(
    work: Workspace, reader: BatchReader, info: CorpusInfo, prompts: HeldoutText
) -> dict[str, Any]:
    """Returns the held-out figures of teachers and ensemble, without loading a model.

    Returns:
        teachers: name → domain or "overall" → rows, ce, perplexity, bits_per_byte, accuracy, agreement,
        ece, entropy, weight, intervals; fused: the same without agreement, entropy and weight.
    """
    from stages.evaluate import ENSEMBLE, cached_sums, table

    options, heldout = work.config.evaluate, info.block_ids("heldout")
    tables = {
        name: table(
            sums.with_bytes(prompts.target_bytes), info, heldout, options.resamples, options.seed
        )
        for name, sums in cached_sums(reader.at(1.0, "bucket"), heldout).items()
    }
    return {"fused": tables.pop(ENSEMBLE), "teachers": tables}


def _generation(
    work: Workspace, model: Any, prompts: HeldoutText
) -> tuple[dict[str, Any], list[Continuation]]:
    """Returns scores by domain of greedy and sampled continuations, and the greedy ones."""
    from stages.text_scores import text_scores

    options = work.config.evaluate
    written = {
        "greedy": continuations(work, model, prompts, 0.0),
        "sampled": continuations(work, model, prompts, options.sample_temperature),
    }
    scores = {n: text_scores(w, options.resamples, options.seed) for n, w in written.items()}
    by_domain = {
        domain: {kind: scores[kind][domain] for kind in written} for domain in scores["greedy"]
    }
    return by_domain, written["greedy"]


def _teacher(
    work: Workspace, job: TeacherJob, reader: BatchReader, info: CorpusInfo, prompts: HeldoutText,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Returns what a teacher must be loaded for, and its size."""
    import torch

    from stages.evaluate import forward_speed
    from stages.model_files import parameters
    from stages.teacher import load_causal_lm

    options, key = work.config.teachers[job.name], f"teachers.{job.name}.model"
    _free()
    model = load_causal_lm(
        job.folder, key, dtype=getattr(torch, options.dtype), attention=options.attention,
        device=device, device_map=options.device_map, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    generation, written = _generation(work, model, prompts)
    _show(prompts, job.name, written)
    bf16, heldout = options.dtype == "bfloat16", info.block_ids("heldout")
    speed = forward_speed(model, reader, heldout, options.batch_blocks, bf16)
    work.progress.advance(1)
    return {
        "parameters": parameters(job.folder, key), "generation": generation, "tokens_per_s": speed,
    }  # fmt: skip


def _show(prompts: HeldoutText, name: str, written: Sequence[Continuation]) -> None:
    for index, sample in prompts.shown.items():
        sample["continuations"][name] = written[index].text


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _students(
    work: Workspace, runs: Mapping[str, Run], models: Mapping[str, Path], device: torch.device,
    jobs: Sequence[TeacherJob],
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Yields the further students, the one before training and each trained one; never two in memory.

    The further ones come first, so that one that does not fit is refused at once.
    """
    import torch

    from stages.student import build_student, require_student_fit
    from stages.teacher import load_causal_lm

    options = work.config.student
    folders = {**models, **{name: run.model_folder for name, run in runs.items()}}
    for name in (*models, BEFORE, *runs):
        _free()
        if name == BEFORE:
            bare = options.model_copy(update={"lora": None})  # new adapters change nothing
            model = build_student(bare, work.student_folder(), device, work.config.train.seed)
        else:
            model = load_causal_lm(
                folders[name], f"student {name}", dtype=torch.float32, device=device,
                attention=options.attention, trust_remote_code=options.trust_remote_code,
            )  # fmt: skip
            require_student_fit(model, jobs[0].layout, f"student {name}")
        yield name, model
        del model


def require_models(work: Workspace, models: Mapping[str, Path], taken: Sequence[str]) -> None:
    """Refuses further students that cannot be told apart or have another tokenizer.

    Raises:
        ConfigError: a name that is taken, or no such folder.
        VocabularyMismatch: another tokenizer than the corpus's.
        TeacherError: no tokenizer beside the model.
    """
    from stages.tokenizer import load_tokenizer, require_same_tokenizer

    ours = work.tokenizer() if models else None
    for name, folder in models.items():
        where = f"--model {name}={folder}"
        if name in (BEFORE, FUSED, BASELINE, *taken):
            raise ConfigError(
                "the run has a model of this name, or could have", where=where, found=name,
                todo="name it otherwise",
            )  # fmt: skip
        if not folder.is_dir():
            raise ConfigError(
                "there is no such model folder", where=where, found=folder,
                todo="give the folder of an exported model",
            )  # fmt: skip
        require_same_tokenizer(ours, load_tokenizer(folder, where), "the corpus", where)


def training_cost(run: Run, device: str) -> dict[str, Any]:
    """Returns steps, tokens, seconds and memory of a training, over all its resumed stretches."""
    rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if "seconds" in row]
    tokens, seconds = (rows[-1]["tokens"], rows[-1]["seconds"]) if rows else (0, 0.0)
    return {
        "steps": run.steps, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_bytes": max((row["peak_bytes"] for row in rows), default=None), "device": device,
    }  # fmt: skip
