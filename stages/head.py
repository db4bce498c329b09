"""The language-model head: hidden states → float32 logits, a chunk of rows at a time.

Shapes: C rows of a chunk, D hidden, P rows of the head's matrix (the vocabulary and its padding).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def _bfloat16_factors() -> Iterator[None]:
    """Lets oneDNN multiply float32 operands as bfloat16, accumulating and returning float32.

    For operands that are bfloat16 values this is exact up to the order of the sums, and on CPUs with
    bfloat16 units several times faster than float32 products; elsewhere oneDNN ignores it.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def product(a: Tensor, b: Tensor, bfloat16: bool, out: Tensor | None = None) -> Tensor:
    """Returns a @ b in float32, with float32 accumulation.

    Args:
        a, b: matrices; rounded to bfloat16 first if `bfloat16`, else taken in float32 (float64
            stays float64).
        out: where the result goes, of its shape and dtype; fresh memory costs page faults.
    """
    if not bfloat16:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return torch.mm(a.to(wide), b.to(wide), out=out)
    if a.device.type == "cuda":
        # torch.mm takes out_dtype or out; the caching allocator makes fresh memory free there.
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    with _bfloat16_factors():
        return torch.mm(a.float(), b.float(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, bfloat16: bool) -> None:
    """Adds a @ b to `total` in place, as `product` computes it, without memory of its own.

    Args:
        total: float32, or float64 where a or b is.
    """
    if bfloat16 and a.device.type == "cuda":
        torch.addmm(total, a.bfloat16(), b.bfloat16(), out_dtype=torch.float32, out=total)
        return
    with _bfloat16_factors() if bfloat16 else contextlib.nullcontext():
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@dataclass(frozen=True)
class HeadRule:
    """What a model does to the head's product: multiply, then cap (z → c·tanh(z/c))."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> HeadRule:
        """Reads the rule from a transformers configuration.

        Granite divides by `logits_scaling` (HyperCLOVA X multiplies), Cohere multiplies by
        `logit_scale`, Falcon-H1 by `lm_head_multiplier`; Gemma caps.
        """
        config = config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        scaling = float(getattr(config, "logits_scaling", None) or 1.0)
        multiplies = str(config.model_type).startswith("hyperclovax")
        scale *= scaling if multiplies else 1.0 / scaling
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(scale, float(cap) if cap else None)

    def apply_(self, logits: Tensor) -> Tensor:
        """Turns products into logits, in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turns d/d logits into d/d products, in place; `logits` are those `apply_` returned."""
        if self.softcap is not None:
            gradient.mul_(1.0 - (logits / self.softcap).square_())
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


def cache_sized(rows: int, device: torch.device) -> range:
    """Returns the starts of slices of a chunk of logits on which element-wise work is quickest.

    A CPU's cache holds some 16 rows, and passes over those cost a fifth of passes over memory; a GPU
    takes the whole chunk.
    """
    return range(0, rows, CACHE_ROWS if device.type == "cpu" else max(rows, 1))


CACHE_ROWS = 16


@dataclass(frozen=True)
class Head:
    """A model's output matrix and rule.

    Attributes:
        weight: [P, D].
        bias: [P] or None.
        rule: what follows the product.
        bfloat16: whether products take bfloat16 factors.
    """

    weight: Tensor
    bias: Tensor | None
    rule: HeadRule
    bfloat16: bool

    @classmethod
    def of(cls, model: Any, bfloat16: bool) -> Head:
        """Returns the head of a transformers causal LM (its live parameters, not copies)."""
        layer = model.get_output_embeddings()
        return cls(layer.weight, getattr(layer, "bias", None), HeadRule.of(model.config), bfloat16)

    def rounded(self) -> Head:
        """Returns the head with its weight rounded once for many products, where they would round it
        every time: bfloat16 products of a float32 weight on a GPU, for 2 bytes of each of P · D."""
        if not self.bfloat16 or self.weight.device.type != "cuda":
            return self
        return replace(self, weight=self.weight.detach().bfloat16())

    def logits(self, hidden_CD: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns float32 logits [C, P] without a gradient, in `out` where the device allows it."""
        with torch.no_grad():
            logits = product(hidden_CD, self.weight.t(), self.bfloat16, out)
            if self.bias is not None:
                logits.add_(self.bias)
            return self.rule.apply_(logits)


def find_decoder_layers(model: Any) -> torch.nn.ModuleList:
    """Returns the module list of a causal LM's decoder blocks.

    Raises:
        LookupError: no module list has as many entries as the configuration has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise LookupError(f"no list of {count} decoder layers in {type(model).__name__}")


def run_decoder(
    model: Any, tokens_BT: Tensor, positions_BT: Tensor, layers: tuple[int, ...]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs a causal LM's decoder on packed blocks.

    Documents are told apart by positions that restart. transformers' flash attention looks at them
    only in a batch of one, so there the blocks are laid end to end: each begins at position 0.

    Returns:
        The head's input [B, T, D], and layer (1 = first) → its output [B, T, D].
    """
    shape = tokens_BT.shape
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        tokens_BT, positions_BT = tokens_BT.reshape(1, -1), positions_BT.reshape(1, -1)
    with captured_layers(model, layers) as found:
        last = model.get_decoder()(
            input_ids=tokens_BT, position_ids=positions_BT, use_cache=False
        ).last_hidden_state
    return last.view(*shape, -1), {n: hidden.view(*shape, -1) for n, hidden in found.items()}


@contextlib.contextmanager
def captured_layers(model: Any, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Collects the outputs of decoder layers (1 = first) of the forwards run inside the block.

    Yields:
        A dict that each forward fills: layer → [B, T, D].
    """
    found: dict[int, Tensor] = {}
    blocks = list(find_decoder_layers(model)) if layers else []

    def keep(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
