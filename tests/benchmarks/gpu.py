"""Both stages on one real GPU: the loss, a teacher's reading, a student's steps.

    python tests/benchmarks/gpu.py [FOLDER] [--parts loss stage-one stage-two] [--seconds 150]
                                   [--device cuda] [--small]                     (make bench-gpu)

FOLDER is runs/bench. Each row is put into FOLDER/gpu.json once it is measured, with the device's name
and the packages' versions. Nothing is downloaded: models have the real shapes and random weights made
on the device. All ends within about --seconds, shared out among the parts: a row that would begin
later is left out, one that takes too long is stopped, and one that fails (for want of memory, say) is
a row with its error. --small takes tiny sizes, on which every line of this can be run with --device cpu.

Machine. What a product of bfloat16 matrices of 4,096 reaches, and a copy within the memory (bytes read
and written). "of the products' rate" is counted against the first.

Loss. Cross-entropy and forward KL from a fused target (three teachers, 64 entries and a bucket each; α =
0.9), or cross-entropy alone, of T rows of float32 hidden states under the student's bfloat16 autocast,
with the gradients of hidden states and head; V = 151,936. "ours" is stages/chunked_head.py with some
chunk_bytes (the default is marked); "dense" autograd through float32 [T, V], left out where that would
not fit; "Liger" its fused kernels with gradients of the head in float32, if liger_kernel can be imported
(its KL wants the target as [T, V] of probabilities: the fused heads without buckets, another loss, and
that target counts as given). Milliseconds are medians by CUDA events after a warm-up; bytes are the peak
allocated beyond hidden states, head and target. nats is the loss a row: ours and dense must agree.

Stage one. A teacher of Qwen2-7B's shape and one of Qwen3-1.7B's (both with a head of their own), blocks
of 2,048 random tokens in documents of some 700, 4 blocks a forward. Weights are random, N(0, 0.02²); the
head's are scaled so that logits are N(0, 5.3²): entropy 3 nats, 91 % of the mass in 64 entries. Ids are
as good as uniform, so that encodings are larger, and encoding slower, than of real text. Rows: the
decoder alone; with the head's product; with annotation (stages/annotate.py, notes copied to the host,
not encoded); and caching by stages/cache_teachers.py, encoding and writing behind the teacher counted,
from the first part's beginning to the last one's commit. What comes before it once, and a large corpus
does not feel (learning the orders of ids), is told apart as begin_seconds. Only loading is replaced: the
model that is there is handed over, since 15 GB written and read again would say nothing of us.
encode_share and write_share are the share of the time in which the thread behind the teacher encodes,
and compresses and writes parts. disk_bytes_a_token counts all that is on disk, orders and metadata too.

Stage two. A student of Qwen2.5-0.5B's shape (tied, random), 4 blocks of 2,048 a step: reading, forward,
backward, clipping, fused AdamW; no gradient checkpointing. Its three caches are written first, by the
product's encoder, from made-up logits (entropy 3 nats, ids skewed as words are, teachers that agree in
part) and read through the operating system's page cache. wait_share is the share of the time in which
the training thread waits for a batch, ready_share that in which it is brought to the device. "own loss"
is what transformers computes. "teachers online" runs one teacher of the 1.7B shape three times a batch:
its weights are in memory once, not three times.

Beside each measurement of a stage stands what `scholiast plan` would say: plan_tokens_per_s from the
measured rate of matrix products, plan_bytes (of which 600 MiB are the GPU's context, which peak_bytes,
what is allocated, does not hold).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gpu_loss
import gpu_stage_one
import gpu_stage_two
from gpu_rows import FULL, SMALL, Recorder

PARTS = {
    "loss": (gpu_loss.run, 1.2),
    "stage-one": (gpu_stage_one.run, 1.6),
    "stage-two": (gpu_stage_two.run, 1.2),
}
"""Part → what does it, and its share of the time."""


def main() -> None:
    parser = argparse.ArgumentParser(description="See the top of the file.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/bench"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    print(__doc__, flush=True)
    sizes = SMALL if asked.small else FULL
    recorder = Recorder(asked.folder, asked.device, sizes, asked.seconds)
    recorder.machine()
    left = sum(PARTS[name][1] for name in asked.parts)
    for name in asked.parts:
        run, share = PARTS[name]
        recorder.begin(name, share / left)
        left -= share
        try:
            run(recorder)
        except Exception as error:  # what one part needs failed; the others do not need it
            recorder.failed("all of the part's rest", error)
    recorder.show()


if __name__ == "__main__":
    main()
