"""What a newcomer need not know: batch sizes, rates, layers and lengths that suit models, text, machine.

Each choice is a rule of thumb, said in the comment beside it; everything can be edited afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.console import human_bytes
from pipeline.start.machine import Machine
from pipeline.start.models import ModelFacts, human_count
from pipeline.start.sources import Found
from stages.train_options import TrainOptions
from storage.errors import ConfigError

_LONGEST = {"cuda": 2048, "cpu": 512}  # tokens of a block, if contexts and text allow
_SHORTEST = 128
_BLOCKS = 64  # of a corpus, at least: with fewer, blocks are made shorter
_STEP_TOKENS = {"cuda": 131_072, "cpu": 4_096}  # of an optimizer step, at most
_STEPS = 150  # of a training, at least, as far as the text goes
_SMALL = 20_000_000  # tokens; a smaller corpus is read three times
_ROOM = 0.8  # of the memory is planned with
_OPTIMIZER_BYTES = 16  # a parameter: float32 weight and gradient, two moments


@dataclass(frozen=True)
class Job:
    """All that was asked and found.

    Attributes:
        name, run_dir, device: of the configuration.
        teachers: name → what it is.
        student: what it is.
        keep_layers: decoder layers that are kept of it; None for all.
        tokenizer: where the corpus's tokenizer comes from.
        ids: V.
        ends: whether that tokenizer has an end-of-sequence token.
        sources: each with its held-out share (0 for none).
        block_length: what the user wants; None to choose.
        machine: where it will run.
    """

    name: str
    run_dir: str
    device: str
    teachers: Mapping[str, ModelFacts]
    student: ModelFacts
    keep_layers: Sequence[int] | None
    tokenizer: str
    ids: int
    ends: bool
    sources: Sequence[tuple[Found, float]]
    block_length: int | None
    machine: Machine

    @property
    def tokens(self) -> int:
        """Of all training sources, about."""
        return sum(found.tokens for found, _ in self.sources if found.options.split == "train")

    @property
    def train_tokens(self) -> float:
        """Of those, what is not held out, about."""
        train = ((f, share) for f, share in self.sources if f.options.split == "train")
        return sum(found.tokens * (1.0 - share) for found, share in train)

    @property
    def models(self) -> list[ModelFacts]:
        return [*self.teachers.values(), self.student]

    @property
    def student_layers(self) -> int:
        return len(self.keep_layers) if self.keep_layers is not None else self.student.layers

    @property
    def random(self) -> bool:
        """Whether the student begins with random weights."""
        return self.student.tokenizer is None


def spread_layers(count: int, layers: int) -> list[int]:
    """Returns so many of a model's decoder layers (0 = first), evenly spread, first and last included.

    Raises:
        ConfigError: there are not so many.
    """
    if not 1 <= count <= layers:
        raise ConfigError(
            "so many layers cannot be kept", where="--keep-layers", expected=f"1 to {layers}",
            found=count, todo="keep fewer",
        )  # fmt: skip
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def block_length(job: Job) -> int:
    """Returns T: what was asked for if it fits every context, else the longest that suits.

    Raises:
        ConfigError: what was asked for is longer than a model's context.
    """
    contexts = {facts.model: facts.context for facts in job.models if facts.context is not None}
    longest = min(contexts.values(), default=_LONGEST[job.machine.device])
    if job.block_length is not None:
        if job.block_length > longest:
            least = min(contexts, key=lambda model: contexts[model])
            raise ConfigError(
                "blocks are longer than a model's context", where="--block-length",
                expected=f"at most {longest}, the context of {least}", found=job.block_length,
                todo="choose shorter blocks",
            )  # fmt: skip
        return job.block_length
    length = min(_LONGEST[job.machine.device], longest)
    while length // 2 >= _SHORTEST and job.tokens // length < _BLOCKS:
        length //= 2
    return length


@dataclass(frozen=True)
class Batches:
    """How a training step is cut.

    Attributes:
        blocks, accumulate: of train.batch_blocks and train.accumulate.
        checkpointing: whether activations are recomputed.
        needed: bytes that weights, moments and one batch take, about.
    """

    blocks: int
    accumulate: int
    checkpointing: bool
    needed: float


def batches(job: Job, length: int, precision: str) -> Batches:
    """Returns the largest batches that the memory holds, and as many of them as the text is worth."""
    facts, machine = job.student, job.machine
    fixed = float(_OPTIMIZER_BYTES * facts.parameters_with(job.student_layers))
    width = 2 if precision == "bf16" else 4
    # What a layer keeps of a token for its backward: about 16 vectors of D and 6 of the MLP's width.
    kept = job.student_layers * (16 * facts.hidden + 6 * facts.inner) * width
    light = job.student_layers * 2 * facts.hidden * width + kept / max(1, job.student_layers)
    room = _ROOM * machine.memory - fixed
    checkpointing = room < kept * length
    each = (light if checkpointing else kept) * length
    wanted = min(_STEP_TOKENS[machine.device], max(length, epochs(job) * job.tokens // _STEPS))
    blocks = max(1, wanted // length)
    most = _power_of_two(min(max(1.0, room / each), blocks, 32 if machine.device == "cuda" else 8))
    return Batches(most, max(1, blocks // most), checkpointing, fixed + most * each)


def teacher_blocks(facts: ModelFacts, job: Job, length: int, width: int) -> tuple[int, float]:
    """Returns the blocks of a teacher's forward, and the bytes it takes with its weights."""
    fixed = float(facts.parameters * width)
    each = (8 * facts.hidden + 3 * facts.inner) * width * length
    room = _ROOM * job.machine.memory - fixed
    blocks = _power_of_two(min(max(1.0, room / each), 32 if job.machine.device == "cuda" else 4))
    return blocks, fixed + blocks * each


def _power_of_two(number: float) -> int:
    return 1 << max(0, int(number).bit_length() - 1)


def epochs(job: Job) -> int:
    return 3 if job.tokens < _SMALL else 1


def learning_rate(job: Job) -> tuple[float, str]:
    """Returns AdamW's peak rate and why."""
    if job.random:
        return 1e-3, "of random weights"
    if job.keep_layers is not None:
        return 1e-3, "of a cut model, which has to heal"
    count = job.student.parameters
    rate = 5e-4 if count < 2e8 else 2e-4 if count < 1e9 else 1e-4
    return rate, "of a whole checkpoint of this size"


def compose(job: Job) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the configuration and its comments.

    Raises:
        ConfigError: blocks that are longer than a context.
    """
    length = block_length(job)
    machine = job.machine
    precision = "bf16" if machine.fast_bf16 else "fp32"
    cut = batches(job, length, precision)
    rate, why = learning_rate(job)
    step = cut.blocks * cut.accumulate * length
    cutting = TrainOptions(epochs=epochs(job), batch_blocks=cut.blocks, accumulate=cut.accumulate)
    steps = cutting.steps_over(max(1, math.ceil(job.train_tokens / length)))
    every = max(10, min(500, steps // 6))
    prompt = min(48, length // 4)
    teachers = {name: _teacher(facts, job, length) for name, facts in job.teachers.items()}
    train: dict[str, Any] = {
        "epochs": epochs(job), "batch_blocks": cut.blocks, "accumulate": cut.accumulate, "lr": rate,
        "precision": precision,
        **({"gradient_checkpointing": True} if cut.checkpointing else {}),
        "eval_every": every, "checkpoint_every": every, "baseline": False,
    }  # fmt: skip
    config = {
        "name": job.name, "run_dir": job.run_dir, "device": job.device,
        "corpus": _corpus(job, length),
        "teachers": teachers,
        "store": {"preset": "compact"},
        "fusion": {"weights": "entropy"},
        "student": _student(job),
        "loss": {"alpha": 0.9, "temperature": 1.0, "features": {"weight": 0.0, "pairs": "auto"}},
        "train": train,
        "evaluate": {"prompt_tokens": prompt, "new_tokens": min(64, length // 4)},
    }  # fmt: skip
    return config, {
        **_comments(job, teachers, length),
        "train.epochs": f"passes over the text; about {steps:,} steps in all",
        "train.batch_blocks": f"of one forward and backward: about {human_bytes(cut.needed)}",
        "train.accumulate": f"of these a step: {step:,} tokens",
        "train.lr": f"AdamW's peak, {why}",
        "train.precision": (
            "bf16 products are the faster ones here" if machine.fast_bf16
            else "bf16 products are slower than float32's here"
        ),
        "train.gradient_checkpointing": "less memory for a forward more",
        "train.eval_every": "steps between figures on held-out text",
        "train.baseline": "true: also train on the text alone, to compare; takes as long again",
    }  # fmt: skip


def _corpus(job: Job, length: int) -> dict[str, Any]:
    sources = []
    for found, share in job.sources:
        own = found.options.model_dump(exclude_defaults=True)
        sources.append({**own, **({"heldout": share} if share else {})})
    return {
        "tokenizer": job.tokenizer, "block_length": length,
        **({} if job.ends else {"append_eos": False}), "sources": sources,
    }  # fmt: skip


def _teacher(facts: ModelFacts, job: Job, length: int) -> dict[str, Any]:
    fast = job.machine.fast_bf16
    blocks, needed = teacher_blocks(facts, job, length, 2 if fast else 4)
    options: dict[str, Any] = {"model": facts.model, "batch_blocks": blocks}
    if facts.layers:
        options["feature_layers"] = [max(1, facts.layers - 1)]
    if not fast:
        options["dtype"] = "float32"
    if needed > job.machine.memory and job.machine.gpus > 1:
        options["device_map"] = "auto"
    return options


def _student(job: Job) -> dict[str, Any]:
    if job.random:
        return {"config": job.student.model}
    kept = {} if job.keep_layers is None else {"keep_layers": list(job.keep_layers)}
    return {"model": job.student.model, **kept}


def _comments(job: Job, teachers: Mapping[str, Any], length: int) -> dict[str, str]:
    count = job.student.parameters_with(job.student_layers)
    kept = (
        f"{job.student_layers} of {job.student.layers} layers" if job.keep_layers else "all of it"
    )
    named = {
        f"corpus.sources.{i}": found.about + (f", {share:.0%} of them held out" if share else "")
        for i, (found, share) in enumerate(job.sources)
    }  # fmt: skip
    return {
        "run_dir": "corpus, notes, student and report",
        "device": job.machine.about,
        "corpus.tokenizer": f"{job.ids:,} ids, shared by all models",
        "corpus.block_length": "tokens that a model reads at once",
        "corpus.append_eos": "the tokenizer has no token to end a document with",
        **named,
        **{f"teachers.{name}": facts.about for name, facts in job.teachers.items()},
        "store.preset": "16 most probable tokens and 16 draws; balanced: 64, twice the bytes",
        "fusion.weights": "token by token, the surer teacher counts more; or uniform",
        "student.model": f"{kept}: {human_count(count)} parameters",
        "student.config": f"random weights: {human_count(count)} parameters",
        "student.keep_layers": "evenly spread; 0 is the first",
        "loss.alpha": "share of the teachers against the text itself",
        "loss.temperature": "or 1.5 or 2, which the notes serve too",
        "loss.features.weight": "of aligning hidden states; 0.1 made no difference in stages/RESULTS.md",
        "loss.features.pairs": "the student's layer at the same relative depth",
        "evaluate.prompt_tokens": "of held-out text, continued for the report",
    }


def problems(job: Job, config: Mapping[str, Any]) -> list[str]:
    """Returns what will not fit this machine, for people."""
    length, memory = config["corpus"]["block_length"], job.machine.memory
    width = 2 if job.machine.fast_bf16 else 4
    told = []
    for name, facts in job.teachers.items():
        needed = teacher_blocks(facts, job, length, width)[1]
        if needed > memory * max(1, job.machine.gpus):
            told.append(
                f"teacher {name} takes about {needed / 1e9:.0f} GB of "
                f"{memory * max(1, job.machine.gpus) / 1e9:.0f}: take a smaller one, or a machine "
                "with more memory (--device-memory)"
            )
    needed = batches(job, length, config["train"]["precision"]).needed
    if needed > memory:
        told.append(
            f"training the student takes about {needed / 1e9:.0f} GB of {memory / 1e9:.0f}: keep "
            "fewer layers, use student.lora, or train on several ranks"
        )
    return told
