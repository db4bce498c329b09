"""The student as one or several ranks run it: plain, replicated (DDP) or sharded (FSDP2).

Every rank's loss is already divided by the step's global counts, so gradients are added up over the
ranks, not averaged. Only a step's last backward adds them up; before it they stay where they are.

ddp:   every rank holds all weights and moments; float32 gradients are added up in buckets.
fsdp:  weights, gradients and moments are cut into one piece a rank. Each decoder layer is gathered for
       its forward and again for its backward; embedding, final norm, head (tied or not) and projections
       are one group that stays gathered in between, because the chunked loss reads the head's matrix
       inside the wrapped forward. With bf16 the layers are gathered as bfloat16 and their gradients
       added up in float32; the outer group stays float32, for its gradients are. Activations are
       autocast as in one process: the policy does not cast what goes in, so the residual stream stays
       float32 there as well.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stages.batches import Batch
from stages.head import find_decoder_layers
from stages.ranks import Ranks
from stages.step_loss import StepLoss
from stages.student import DistilledStudent
from stages.train_options import TrainOptions


class ParallelStudent:
    """A student on its ranks' devices, ready to train.

    Args:
        student: in float32, on any device, the same on every rank.
        ranks: who train together.
        train: `parallel`, `precision`, `compile`, `gradient_checkpointing`.
    """

    def __init__(self, student: DistilledStudent, ranks: Ranks, train: TrainOptions) -> None:
        self.student, self._module = student, cast(nn.Module, student)
        self._sharded = ranks.world > 1 and train.parallel == "fsdp"
        if train.gradient_checkpointing:
            checkpoint_layers(student.model)
        if train.compile:
            compile_layers(student.model)
        if self._sharded:
            shard(student, ranks, train.precision == "bf16")
        else:
            student.to(ranks.device)
            if ranks.world > 1:
                self._module = replicate(student, ranks)

    def __call__(self, batch: Batch, rows: int, segments: int, alpha: float) -> StepLoss:
        """Returns the losses of this rank's batch; the loss runs inside the wrapped forward."""
        return cast(StepLoss, self._module(batch, rows, segments, alpha))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds to the gradients; a step's last one adds them up over the ranks."""
        if self._sharded:
            cast(FSDPModule, self.student).set_requires_gradient_sync(last)
        loss.backward()  # type: ignore[no-untyped-call]

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Wraps a forward and its backward."""
        if isinstance(self._module, DistributedDataParallel) and not last:
            return self._module.no_sync()
        return contextlib.nullcontext()

    def clip(self, largest: float) -> Tensor:
        """Scales the gradients to a norm of at most `largest`; returns the norm before that."""
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def settle(self) -> None:
        """Lets go of what a forward without a backward left gathered: parameters are pieces again."""
        if self._sharded:
            cast(FSDPModule, self.student).reshard()


def checkpoint_layers(model: Any) -> None:
    """Keeps only the layers' inputs for the backward, and computes the rest again."""
    name = "activation_checkpointing_enable"  # since transformers 5.23
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model: Any) -> None:
    """Compiles the decoder layers' forwards; names of parameters and hooks stay as they are."""
    for layer in find_decoder_layers(model):
        layer.forward = torch.compile(layer.forward)


def replicate(student: DistilledStudent, ranks: Ranks) -> DistributedDataParallel:
    """Returns the student under DDP, with gradients that are added up and not averaged."""
    on_gpu = ranks.device.type == "cuda"
    with warnings.catch_warnings():  # the option has another name since torch 2.13
        warnings.simplefilter("ignore", FutureWarning)
        module = DistributedDataParallel(
            student, device_ids=[ranks.device.index] if on_gpu else None, broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )  # fmt: skip
    # A function would need annotations that are no strings.
    module.register_comm_hook(None, lambda _, bucket: _added_up(bucket.buffer()))
    return module


def _added_up(gradients: Tensor) -> Any:
    work: Any = dist.all_reduce(gradients, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def shard(student: DistilledStudent, ranks: Ranks, bf16: bool) -> None:
    """Cuts the student into pieces, in place: each decoder layer, then everything else."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    inner = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )  # fmt: skip
    outer = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in find_decoder_layers(student.model):
        fully_shard(layer, mesh=mesh, mp_policy=inner)
    fully_shard(student, mesh=mesh, mp_policy=outer)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def full_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Returns a model's whole state dict on the CPU, gathered a tensor at a time.

    Every rank calls this; those that do not keep it get an empty one. Tied tensors stay tied.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict().items():
        same = id(parameters.get(name, value))
        if same not in seen:
            tensor = value.full_tensor() if isinstance(value, DTensor) else value.detach()
            seen[same] = tensor.to("cpu") if keep else torch.empty(0)
        if keep:
            whole[name] = seen[same]
    return whole
