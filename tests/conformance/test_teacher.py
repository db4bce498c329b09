"""What every teacher backend must do, and the notes made from it against a dense forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab, make_model

from stages.annotate import PartAnnotator
from stages.head import HeadRule, run_decoder
from stages.options import TeacherOptions
from stages.row_notes import NoteRule, annotate_logits
from stages.teacher import TeacherBackend, TransformersTeacher, require_fit
from storage.codec import from_bfloat16
from storage.errors import NonFiniteLogits, TeacherError, VocabularyMismatch
from storage.layout import Layout
from storage.notes import NotesDecoder
from storage.orders import learn_orders
from storage.types import LOG_ZERO, TokenBlocks

V, T = 97, 24
CPU = torch.device("cpu")


def blocks() -> TokenBlocks:
    """Two blocks: three documents and padding; a masked token."""
    generator = np.random.default_rng(0)
    document = np.zeros((2, T + 1), np.int64)
    document[0, 10:], document[1, :5], document[1, 5:18], document[1, 18:] = 1, 1, 2, -1
    mask = np.ones((2, T + 1), bool)
    mask[0, 4] = False
    tokens = generator.integers(0, V, (2, T + 1)).astype(np.int32)
    return TokenBlocks(np.array([6, 7]), tokens, document, np.zeros((2, T + 1), np.int64), mask)


def layout(k: int = 8, **changes: Any) -> Layout:
    base: dict[str, Any] = {
        "blocks": 8, "blocks_per_part": 2, "block_length": T, "vocab_size": V, "k": k,
        "preset": "exact", "temperatures": (0.7, 2.0), "feature_layers": (1, 3), "segments": 2,
        "hidden_size": 32,
    }  # fmt: skip
    return Layout(**{**base, **changes})


def teacher(folder: Path, dtype: str = "float32") -> TransformersTeacher:
    return TransformersTeacher("t", folder, TeacherOptions(model="m", dtype=dtype), CPU)


class BackendConformance:
    """A backend's test class gives `make`, a backend of a model and that model."""

    def make(self, folder: Path) -> tuple[TeacherBackend, Any]:
        raise NotImplementedError

    def test_head_of_hidden_states_is_the_models_logits(self, tmp_path: Path) -> None:
        backend, model = self.make(tmp_path / "m")
        tokens = torch.arange(T)[None]
        states = backend.forward(tokens, tokens, (2,))
        with torch.no_grad():
            out = model(tokens, output_hidden_states=True)
        ours = backend.logits(states.last[0])
        assert ours.dtype == torch.float32 and ours.shape == (T, backend.head_rows)
        torch.testing.assert_close(ours, out.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states.layers[2], out.hidden_states[2], rtol=1e-4, atol=1e-4)

    def test_packed_documents_do_not_see_one_another(self, tmp_path: Path) -> None:
        backend, _ = self.make(tmp_path / "m")
        tokens = torch.arange(T)[None]
        positions = torch.cat([torch.arange(9), torch.arange(T - 9)])[None]
        packed = backend.forward(tokens, positions, ()).last[0]
        for piece in (slice(0, 9), slice(9, T)):
            alone = backend.forward(tokens[:, piece], positions[:, piece], ()).last[0]
            torch.testing.assert_close(packed[piece], alone, rtol=1e-4, atol=1e-5)


class TestTransformers(BackendConformance):
    def make(self, folder: Path) -> tuple[TeacherBackend, Any]:
        model = make_model(folder, V, 5)
        return teacher(folder), model


ORDERS = learn_orders(np.arange(40).reshape(5, 8), V)


def at_once(work: Callable[..., object], *arguments: Any) -> None:
    work(*arguments)


def annotated(backend: TeacherBackend, stored: Layout, chunk: int, batch: int) -> Any:
    """The arrays of `blocks()`, and the notes they decode to."""
    annotator = PartAnnotator("t", backend, stored, chunk)
    arrays = annotator.annotate(blocks(), ORDERS, batch, lambda tokens: None, at_once)
    decoder = NotesDecoder(stored, ORDERS)
    packed = {name: array.copy() for name, array in arrays.items()}
    return arrays, decoder.head(packed), decoder.stats(packed)


def dense_logp(model: Any, given: TokenBlocks, row: int) -> torch.Tensor:
    """Full log-softmax of each position, a document at a time, float64 [T, V]."""
    found = torch.zeros(T, V, dtype=torch.float64)
    numbers = given.document[row, :-1]
    for number in np.unique(numbers):
        where = np.flatnonzero(numbers == number)
        with torch.no_grad():
            logits = model(torch.from_numpy(given.inputs[row, where].astype(np.int64))[None]).logits
        found[where] = logits[0, :, :V].double().log_softmax(-1)
    return found


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("padding", [0, 31])
def test_notes_are_those_of_a_dense_forward(tmp_path: Path, k: int, padding: int) -> None:
    """Row t predicts token t+1; padding rows of the head are left out of the softmax."""
    model = make_model(tmp_path / "m", V + padding, 5)
    given, stored = blocks(), layout(k)
    arrays, head, stats = annotated(teacher(tmp_path / "m"), stored, 5, 2)
    scored = given.scored
    assert not scored[0, 3] and not scored[0, 9] and not scored[1, 17:].any()
    for row in range(2):
        logp = dense_logp(model, given, row)
        for t in np.flatnonzero(scored[row]):
            p = logp[t].exp()
            top = logp[t].sort(descending=True)
            order = np.argsort(-head.logprobs[row, t])
            np.testing.assert_array_equal(head.ids[row, t][order], top.indices[:k])
            close = {"rtol": 1e-4, "atol": 1e-5}
            found = head.logprobs[row, t][order]
            np.testing.assert_allclose(found, top.values[:k], **close)
            gold = int(given.tokens[row, t + 1])
            np.testing.assert_allclose(stats.gold_logprob[row, t], logp[t, gold], **close)
            np.testing.assert_allclose(stats.entropy[row, t], -(p * logp[t]).sum(), **close)
            tail = float(p.sum() - top.values[:k].exp().sum())
            found = np.exp(stats.log_tail_mass[row, t])
            np.testing.assert_allclose(found, tail if k < V else 0.0, rtol=1e-3, atol=1e-6)
            for z, temperature in enumerate(stored.temperatures):
                expected = (logp[t] / temperature).logsumexp(-1)
                np.testing.assert_allclose(stats.log_z[row, t, z], expected, **close)
    for name in ("head_ids", "head_logprobs", "entropy", "gold_logprob", "log_z"):
        per_token = arrays[name] if arrays[name].ndim == 2 else arrays[name].swapaxes(1, 2)
        assert not per_token[~scored].any()


def test_features_are_means_over_present_tokens_and_the_last_of_them(tmp_path: Path) -> None:
    make_model(tmp_path / "m", V, 5)
    backend, given = teacher(tmp_path / "m"), blocks()
    arrays = annotated(backend, layout(pooling=("mean", "last")), 5, 1)[0]
    assert arrays["feature_count"].tolist() == [[12, 12], [12, 6]]
    tokens = torch.from_numpy(given.inputs.astype(np.int64))
    states = backend.forward(tokens, torch.from_numpy(given.positions), (1, 3))
    for layer in (1, 3):
        expected = states.layers[layer][1, 12:18].mean(0).numpy()
        found = from_bfloat16(arrays[f"feature_{layer}"])[1, 1]
        np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-3)
        for place, position in (((0, 0), 11), ((0, 1), 23), ((1, 0), 11), ((1, 1), 17)):
            expected = states.layers[layer][place[0], position].numpy()
            found = from_bfloat16(arrays[f"feature_last_{layer}"])[place]
            np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunk_and_batch_change_nothing_but_memory(tmp_path: Path, chunk: int) -> None:
    make_model(tmp_path / "m", V, 5)
    backend = teacher(tmp_path / "m")
    plain, other = (annotated(backend, layout(), *how)[0] for how in ((7, 2), (chunk, 1)))
    for name, array in plain.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(other[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_are_refused_with_their_place(tmp_path: Path, value: float) -> None:
    make_model(tmp_path / "m", V, 5)
    backend, calls = teacher(tmp_path / "m"), []
    real = backend.logits

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        out = real(hidden).clone()
        calls.append(len(out))
        if len(calls) == 3:
            out[1, 11] = value
        return out

    backend.logits = broken  # type: ignore[method-assign]
    annotator = PartAnnotator("mine", backend, layout(), 5)
    rows, positions = np.nonzero(blocks().scored)
    place = f"block {blocks().block_ids[rows[11]]}, position {positions[11]}"
    with pytest.raises(NonFiniteLogits, match="teacher 'mine'") as caught:
        annotator.annotate(blocks(), ORDERS, 2, lambda tokens: None, at_once)
    assert place in str(caught.value)


def test_certain_teacher_has_an_empty_tail_and_no_infinity() -> None:
    logits = torch.full((2, V), -500.0)
    logits[:, 3] = 500.0
    uniform = torch.zeros(2, dtype=torch.float64)
    notes = annotate_logits(logits, torch.tensor([3, 4]), NoteRule(4, (2.0,)), uniform)
    assert notes.log_tail_mass.tolist() == [LOG_ZERO, LOG_ZERO]
    assert notes.gold_logprob.tolist() == [0.0, -1000.0]
    assert notes.entropy.tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(notes.logprobs).all()) and bool(torch.isfinite(notes.log_z).all())


def test_bfloat16_head_keeps_float32_results(tmp_path: Path) -> None:
    """A bf16 product would be off by 2^-9 of the largest logit; ours by float32 rounding only."""
    make_model(tmp_path / "m", V, 5)
    backend = teacher(tmp_path / "m", "bfloat16")
    hidden = torch.randn(9, 32).bfloat16()
    weight = backend._model.get_output_embeddings().weight
    exact = hidden.double() @ weight.double().t()
    error = (backend.logits(hidden).double() - exact).abs().max() / exact.abs().max()
    assert float(error) < 1e-5


def test_softcapped_and_scaled_heads_are_the_models_own(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    small: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
        "max_position_embeddings": 64,
    }  # fmt: skip
    gemma = Gemma2Config(**small, head_dim=8, final_logit_softcapping=3.0, sliding_window=8)
    granite = GraniteConfig(**small, logits_scaling=4.0)
    for name, config, model in (
        ("gemma", gemma, Gemma2ForCausalLM),
        ("granite", granite, GraniteForCausalLM),
    ):
        model(config).save_pretrained(tmp_path / name)
        teacher(tmp_path / name)  # its own check compares the logits
    assert HeadRule.of(gemma) == HeadRule(1.0, 3.0) and HeadRule.of(granite) == HeadRule(0.25, None)


def test_head_that_we_do_not_reproduce_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "m", V, 5)
    monkeypatch.setattr(HeadRule, "of", classmethod(lambda cls, config: cls(1.5)))
    with pytest.raises(TeacherError, match="head of LlamaForCausalLM"):
        teacher(tmp_path / "m")


def test_flash_attention_reads_blocks_end_to_end(tmp_path: Path) -> None:
    """Where only a batch of one is told apart by positions, blocks are laid out as one row."""
    model = make_model(tmp_path / "m", V, 5)
    tokens = torch.arange(2 * T).view(2, T) % V
    positions = torch.cat([torch.arange(9), torch.arange(T - 9)]).expand(2, -1)
    with torch.no_grad():
        last, layers = run_decoder(model, tokens, positions, (1, 3))
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        shapes: list[Any] = []
        pretend = SimpleNamespace(
            config=SimpleNamespace(
                _attn_implementation="flash_attention_2", get_text_config=lambda: model.config
            ),
            get_decoder=model.get_decoder,
        )
        flat, flat_layers = run_decoder(pretend, tokens, positions, (1, 3))
    assert shapes == [(1, 2 * T)]
    torch.testing.assert_close(flat, last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flat_layers, layers, rtol=1e-4, atol=1e-5)


def test_teacher_with_too_few_logits_or_layers_is_refused(lab: Lab) -> None:
    backend = teacher(lab.root / "a")
    require_fit(backend, "t", lab.vocab_size, (3,))
    with pytest.raises(VocabularyMismatch, match="fewer logits"):
        require_fit(backend, "t", lab.vocab_size + 1, ())
    with pytest.raises(TeacherError, match="no such layer"):
        require_fit(backend, "t", lab.vocab_size, (4,))
