"""Peak memory of both stages by term, from the models' shapes: what the code holds, and when.

A stage has two moments that can be its largest; on a GPU a plan shows the terms of the larger. A CPU's
allocator keeps much of what is freed, so a process's resident size is what was ever held: there the terms
of both are taken together. Bytes a token of a layer follow the forward of a decoder of the Llama kind
(attention, gated MLP, RMSNorm in float32); pipeline/README.md says how near that comes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.planning.parts import layout_of
from pipeline.planning.shapes import Shape
from pipeline.workspace import Workspace
from stages.chunk_sizes import loss_rows, notes_rows
from stages.layer_pairs import wanted_layers
from storage.writer import open_cache

_PARTS_IN_MEMORY = 3  # one in work, two encoded
RUNTIME = {True: 600 << 20, False: 500 << 20}
"""Bytes that are there before a model is, by whether on a GPU: its context and libraries; a process's
resident size when it has imported all that a stage imports (490 MB with torch's build for CPUs)."""
RUNTIME_NAME = {True: "context and libraries", False: "interpreter, torch and libraries"}


@dataclass(frozen=True)
class Peak:
    """The memory of one model's stage, on one device.

    Attributes:
        what: "teachers.NAME" or "student".
        ranks: devices over which its pieces lie; 1 if each holds everything.
        moment: when it is largest.
        terms: bytes of each term at that moment, largest first.
        measured: what was measured, in bytes; None if nothing was.
    """

    what: str
    ranks: int
    moment: str
    terms: Mapping[str, int] = field(default_factory=dict)
    measured: int | None = None

    @property
    def bytes(self) -> int:
        """The estimate: the sum of the terms."""
        return sum(self.terms.values())


def teacher_peak(
    work: Workspace, name: str, shape: Shape, gpu: bool, width: int, devices: int
) -> Peak:
    """Returns the memory of stage one with one teacher.

    Args:
        width: blocks of a part.
        devices: over which a teacher with `device_map` is spread.
    """
    options, store = work.config.teachers[name], work.config.store
    device = "cuda" if gpu else "cpu"
    layout = layout_of(work, name, width, width)
    e = 2 if options.dtype == "bfloat16" else 4
    length = layout.block_length
    tokens = options.batch_blocks * length
    pieces = devices if options.device_map else 1
    always = {RUNTIME_NAME[gpu]: RUNTIME[gpu], "weights": e * shape.parameters // pieces}
    if e == 2 and not gpu:
        always["head in float32"] = 4 * shape.head
    note = 12 * (layout.k + layout.draws) + 4 * (4 + len(layout.temperatures))
    if not gpu:  # on the host: three batches of notes, and encoded parts
        always["notes of batches behind"] = 3 * tokens * note
        part = layout.bytes_per_token_raw() * length * width
        always["encoded parts"] = int(_PARTS_IN_MEMORY * part)
    hidden = (1 + len(layout.feature_layers)) * tokens * shape.hidden * e
    forward = {
        "activations of a forward": tokens * _forward(shape, e),
        "attention mask": options.batch_blocks * length * length * (1 + e),
        "hidden states": hidden,
    }
    if options.attention == "eager":
        forward["attention weights"] = options.batch_blocks * shape.heads * length**2 * (4 + e)
    chunk = min(notes_rows(shape.vocab, device, store.chunk_tokens), tokens)
    head = {
        "hidden states": hidden + tokens * shape.hidden * e,
        "logits chunk": 4 * chunk * shape.vocab * (2 if gpu and e == 2 else 1),
        "statistics of a chunk": 2 * 4 * shape.vocab * (chunk if gpu else 2 * _threads(work)),
        "notes of a batch": 2 * tokens * note,
    }
    return _largest(f"teachers.{name}", pieces, gpu, always, {"forward": forward, "head": head})


def _forward(shape: Shape, e: int) -> int:
    """Returns the bytes a token of one layer's forward without a gradient: its larger half."""
    attention = e * (2 * shape.hidden + 5 * shape.queries + 4 * shape.keys)
    mlp = e * (2 * shape.hidden + 3 * shape.inner)
    norm = e * shape.hidden + 3 * 4 * shape.hidden
    return max(attention, mlp, norm)


def student_peak(work: Workspace, shape: Shape, gpu: bool, ranks: int) -> Peak:
    """Returns the memory of stage two on one of some ranks.

    Raises:
        ConfigError: a step cannot be shared out among the ranks.
    """
    from stages.stream import shared_out  # which loads torch

    config = work.config
    train, loss = config.train, config.loss
    blocks, micro = shared_out(train.batch_blocks, train.accumulate, ranks)
    sharded = train.parallel == "fsdp" and ranks > 1
    pieces = ranks if sharded else 1
    projections = _projections(work, shape)
    trainable, length = shape.trainable + projections, config.corpus.block_length
    tokens, bf16 = blocks * length, train.precision == "bf16"
    e, remade = 2 if bf16 else 4, train.gradient_checkpointing
    entries, gradients = fused_entries(work), 4 * trainable // pieces
    target = tokens * (16 * entries + 8 * len(config.fused_teachers))
    # On a CPU also the step that is read ahead, and what it is fused from.
    readers = 1 if gpu else 3
    always = {
        RUNTIME_NAME[gpu]: RUNTIME[gpu],
        "weights": 4 * (shape.parameters + projections) // pieces,
        "optimizer states": 8 * trainable // pieces,
        "fused targets": micro * readers * target,
    }
    if not gpu and shape.checkpoint > shape.parameters:
        always["layers that were cut away"] = 4 * (shape.checkpoint - shape.parameters)
    if sharded:
        outer = shape.parameters - shape.decoder + projections
        layer = shape.decoder // max(1, shape.layers)
        always["gathered weights"] = 4 * outer + 2 * (2 if bf16 else 4) * layer
        always["gathered gradients"] = 4 * (outer + layer)
    device = "cuda" if gpu else "cpu"
    chunk = min(loss_rows(shape.vocab, device, loss.chunk_bytes, loss.chunk_tokens), tokens)
    head_trained = shape.trainable == shape.parameters
    end_of_forward = {
        "gradients": gradients if micro > 1 else 0,
        "bfloat16 weights": 2 * shape.decoder if bf16 and not remade else 0,
        "activations": tokens * _kept(shape, bf16, remade),
        "activations of one layer again": tokens * _layer(shape, bf16) if remade else 0,
        "attention mask": blocks * length**2 * (1 + e * (1 if remade else shape.layers)),
        "head's input and its gradient": 3 * 4 * tokens * shape.hidden,
        # Of a step's first batch it becomes the gradient itself, which a CPU's sum has already.
        "head's gradient": 4 * shape.head if head_trained and (gpu or micro > 1) else 0,
        "head in bfloat16": 2 * shape.head if gpu and bf16 else 0,
        "targets merged": 64 * tokens * entries * gpu,
        "logits chunk": 4 * chunk * shape.vocab,
        "loss of a chunk": 4 * (chunk if gpu else 16) * shape.vocab
        * (1 if loss.temperature == 1.0 else 3),
    }  # fmt: skip
    end_of_backward = {
        "gradients": gradients,
        "embedding's gradient": 4 * shape.head if head_trained else 0,
        # A CPU keeps the chunk for the next time.
        "logits chunk": 0 if gpu else 4 * chunk * shape.vocab,
    }
    moments = {"end of the forward": end_of_forward, "end of the backward": end_of_backward}
    return _largest("student", pieces, gpu, always, moments)


def fused_entries(work: Workspace) -> int:
    """Returns the head entries and draws a token of all teachers that are fused; of an imported cache
    those that it has."""
    config, total = work.config, 0
    for name in config.fused_teachers:
        head, draws = config.store.entries, config.store.drawn
        opened = open_cache(config.cache_folder / name) if work.imported(name) else None
        if opened is not None:
            head, draws = opened[1].k, opened[1].draws
        total += min(config.fusion.k or head, head) + draws
    return total


def _kept(shape: Shape, bf16: bool, checkpointed: bool) -> int:
    """Returns the bytes a token that all layers keep for the backward."""
    return shape.layers * (4 * shape.hidden if checkpointed else _layer(shape, bf16))


def _layer(shape: Shape, bf16: bool) -> int:
    """Returns the bytes a token that one layer keeps for its backward.

    Under autocast each linear map keeps a bfloat16 copy of its input of its own; both norms keep their
    input and what they made of it in float32; attention, where there is a mask, keeps queries, keys and
    values of as many heads, and its output twice: as it was, and laid out for the next map.
    """
    d, q, i = shape.hidden, shape.queries, shape.inner
    if bf16:
        return 26 * d + 10 * q + 8 * i
    return 24 * d + 20 * q + 16 * i


def _projections(work: Workspace, shape: Shape) -> int:
    """Returns the parameters of the projections to the teachers' features."""
    features, config = work.config.loss.features, work.config
    if not features.weight or features.kind == "gram":
        return 0
    stored = {name: config.teachers[name].feature_layers for name in config.fused_teachers}
    sizes = {name: layout_of(work, name, 1, 1).hidden_size for name in stored}
    wanted = wanted_layers(features, stored)
    return sum(len(wanted[name]) * sizes[name] * (shape.hidden + 1) for name in stored)


def _largest(
    what: str, ranks: int, gpu: bool, always: dict[str, int],
    moments: Mapping[str, Mapping[str, int]],
) -> Peak:  # fmt: skip
    """Returns the larger of two moments, or on a CPU both together."""
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    held = dict(moments[moment])
    if not gpu:
        moment = "taken together"
        for terms in moments.values():
            held |= {name: max(size, held.get(name, 0)) for name, size in terms.items()}
    found = {name: size for name, size in {**always, **held}.items() if size}
    return Peak(what, ranks, moment, dict(sorted(found.items(), key=lambda item: -item[1])))


def _threads(work: Workspace) -> int:
    return work.config.threads or os.cpu_count() or 1
