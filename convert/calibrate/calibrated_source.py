"""A source whose layers are quantized one after the other, each on what the quantized layers before it give."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.calibrate.block_forward import BlockForward, MtpForward
from convert.calibrate.calibration_data import CalibrationConfig
from convert.calibrate.saved_state import CalibrationState, load_latest_notes, load_state, save_state
from convert.calibrate.signround import SignRoundConfig, quantize_by_search, supports_signround, tune_block
from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER, Leaf, checkpoint_layout
from glm_jax.checkpoint.sources.base import Array, WeightChunk, WeightSource, to_plain_array
from glm_jax.checkpoint.sources.quantized import RequantizedSource, require_finite
from glm_jax.errors import MemoryPlanError
from glm_jax.memory.devices import available_device_memory
from glm_jax.ops.norm import rms_norm
from glm_jax.weights import QuantizedTensor, QuantRules, dequantize
from glm_jax.weights.params import ParamPath

# Experts that see fewer tokens than this keep what the search found: rounding learned on less fits only these tokens.
MIN_EXPERT_TOKENS = 64
_FLOAT32_COPIES = 6  # float32 copies of a layer: weights, offsets, gradients, soft weights, and their updates


class CalibratedSource(RequantizedSource):
    """Weights quantized with learned rounding; see :mod:`convert.calibrate.signround`.

    Embedding and head, and matrices whose storage is not of plain integers, are quantized by the search for the least
    squared error.

    Args:
        base: the source.
        quant: which weights are stored how.
        calibration: the text.
        settings: of the descent.
        dtype: of the model.
        keep: paths of parameters that stay as they are, whatever the rules say.

    Raises:
        CheckpointError: if there is too little text.
    """

    def __init__(
        self,
        base: WeightSource,
        quant_rules: QuantRules,
        calibration: CalibrationConfig = CalibrationConfig(),
        config: SignRoundConfig = SignRoundConfig(),
        *,
        dtype: Any = "bfloat16",
        exclude: Collection[ParamPath] = (),
    ) -> None:
        super().__init__(base, quant_rules, "mse", dtype=dtype, exclude=exclude)
        self._tokens = calibration.load_windows(base.cfg, base.info.folder)
        self._settings = config
        self._checkpoint_names = [part for part in checkpoint_layout(self.cfg) if part != NON_LAYER]
        self._state: CalibrationState | None = None
        self._learned: tuple[str, dict[str, QuantizedTensor]] = ("", {})
        self._folder: FilePath | None = None
        self._keep_all = False
        self._advance: Callable[[float], None] = lambda share: None

    def fingerprint(self) -> str:
        """Also of the text and the settings."""
        tokens = hashlib.sha256(self._tokens.tobytes()).hexdigest()
        return hashlib.sha256(f"{super().fingerprint()} {tokens} {self._settings!r}".encode()).hexdigest()

    def start_conversion(self, folder: FilePath, *, keep_all: bool) -> None:
        """Keeps the state of a layer in ``folder``; of every layer where a file of several begins with its first."""
        self._folder, self._keep_all = folder, keep_all

    def on_progress(self, advance: Callable[[float], None]) -> None:
        """Tells ``advance`` the share of a layer's descent that is done."""
        self._advance = advance

    def conversion_notes(self) -> tuple[str, ...]:
        """What happened to each layer, so far."""
        return load_latest_notes(self._folder, self.fingerprint()) if self._state is None else self._state.notes

    def state_bytes(self) -> int:
        """What is kept on disk between layers, at most."""
        one = 8 * self._tokens.size * self.cfg.hidden_size
        return one * (len(self._checkpoint_names) + 1 if self._keep_all else 3)

    def memory_bytes(self) -> int:
        """An estimate of what the largest layer needs."""
        values = max(
            sum(leaf.size for leaf in members)
            for part, members in checkpoint_layout(self.cfg).items()
            if part != NON_LAYER
        )
        streams = 3 * self._tokens.size * self.cfg.hidden_size
        return 4 * (_FLOAT32_COPIES * values + streams)

    def require_memory(self) -> None:
        """Raises :class:`~glm_jax.errors.MemoryPlanError` if the largest layer does not fit."""
        needed, free = self.memory_bytes(), available_device_memory(jax.devices()[0])
        if needed > free:
            raise MemoryPlanError(
                f"learned rounding needs about {needed / 1e9:.1f} GB for one layer ({_FLOAT32_COPIES} float32 arrays of its "
                f"size, and the text's activations), {free / 1e9:.1f} GB are free: use --method mse, or a machine "
                "with more memory"
            )

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Learned weights whole; the rest as the search gives them."""
        spec = self.quant_spec(leaf)
        if leaf.checkpoint_name == NON_LAYER or spec is None or not supports_signround(spec):
            yield from super().iter_chunks(leaf, start, stop)
            return
        whole = self._learned_layer(leaf.checkpoint_name)[leaf.name]
        yield (start, whole[start:stop]) if len(leaf.shape) > 2 else (0, whole)

    def _learned_layer(self, part: str) -> dict[str, QuantizedTensor]:
        if self._learned[0] != part:
            index = self._checkpoint_names.index(part)
            walk = self._state if self._state and self._state.layer_index == index else None
            walk = walk or load_state(self._folder, index, self.fingerprint())
            if walk is None:  # nothing that was kept leads here, so the layers before are learned again
                if index:
                    self._learned_layer(self._checkpoint_names[index - 1])
                    walk = self._state
                else:
                    walk = CalibrationState(0, self._embed(quantized=False), self._embed(quantized=True), ())
            assert walk is not None
            self._state, made = self._tune_layer(part, walk)
            self._learned = (part, made)
            save_state(self._folder, self._state, self.fingerprint(), keep_all=self._keep_all)
        return self._learned[1]

    def _tune_layer(self, part: str, walk: CalibrationState) -> tuple[CalibrationState, dict[str, QuantizedTensor]]:
        members = {leaf.path: leaf for leaf in checkpoint_layout(self.cfg)[part]}
        weights = {path: self._load_array(leaf) for path, leaf in members.items()}
        forward = MtpForward(self.cfg) if part == MTP else BlockForward(self.cfg)
        exact, seen = (walk.reference_inputs, walk.quantized_inputs) if part != MTP else self._mtp_inputs(walk)
        targets = self._run_forward(forward, weights, exact)
        start = {
            path: quantize_by_search(weights[path], spec, self._dtype)
            for path, leaf in members.items()
            if (spec := self.quant_spec(leaf))
        }
        loads = self._expert_token_counts(forward, weights, seen) if ("moe", "router") in members else None
        learn = {
            path: _learn_mask(path, weights[path], loads) for path in start if supports_signround(start[path].spec)
        }
        step = 1.0 / self._settings.steps
        tuned, before, after = tune_block(
            forward, weights, start, learn, seen, targets, self._settings, lambda n: self._advance(n * step)
        )
        notes = (*walk.notes, _note(part, before, after, loads))
        if part != MTP:
            held = {**weights, **{path: dequantize(weight) for path, weight in tuned.items()}}
            walk = CalibrationState(walk.layer_index + 1, targets, self._run_forward(forward, held, seen), notes)
        on_host = {path: weight.map_components(lambda _, array: np.asarray(array)) for path, weight in tuned.items()}
        return dataclasses.replace(walk, notes=notes), {members[path].name: weight for path, weight in on_host.items()}

    def _load_array(self, leaf: Leaf) -> jax.Array:
        """A whole array in float32, on the device."""
        out = np.empty(leaf.shape, np.float32)
        for row, piece in self._iter_values(self.base_leaf(leaf), 0, None):
            values = np.asarray(piece)
            out[row : row + len(values)] = values
        require_finite(out, leaf)
        return jnp.asarray(out)

    def _embed(self, *, quantized: bool) -> Array:
        """The text's embeddings ``[N, T, D]``."""
        (leaf,) = (leaf for leaf in checkpoint_layout(self.cfg)[NON_LAYER] if leaf.name == "embed")
        return self._gather_rows(leaf, self._tokens, quantized=quantized)

    def _gather_rows(self, leaf: Leaf, tokens: Array, *, quantized: bool) -> Array:
        out = np.empty((*tokens.shape, leaf.shape[-1]), np.float32)
        pieces = super().iter_chunks(leaf) if quantized else self._iter_values(self.base_leaf(leaf), 0, None)
        for row, piece in pieces:
            values = to_plain_array(piece) if isinstance(piece, QuantizedTensor) else np.asarray(piece)
            here = (tokens >= row) & (tokens < row + len(values))
            out[here] = values[tokens[here] - row]
        return out

    def _mtp_inputs(self, walk: CalibrationState) -> tuple[Array, Array]:
        """Embeddings of the next tokens beside the final states, of both models."""
        parts = checkpoint_layout(self.cfg)
        own = [leaf for leaf in parts[MTP] if leaf.name == "embed"]
        table = own[0] if own else next(leaf for leaf in parts[NON_LAYER] if leaf.name == "embed")
        norm = self._load_array(next(leaf for leaf in parts[NON_LAYER] if leaf.name == "norm"))

        def joined(states: Array, *, quantized: bool) -> Array:
            embedded = self._gather_rows(table, self._tokens[:, 1:], quantized=quantized)
            final = np.asarray(rms_norm(jnp.asarray(states[:, :-1]), norm, self.cfg.rms_norm_eps))
            return np.concatenate([embedded, final], axis=-1)

        return joined(walk.reference_inputs, quantized=False), joined(walk.quantized_inputs, quantized=True)

    def _run_forward(self, forward: Any, weights: Mapping[ParamPath, Any], inputs: Array) -> Array:
        rows = self._settings.batch_size
        parts = [_apply(forward, weights, inputs[at : at + rows]) for at in range(0, len(inputs), rows)]
        return np.concatenate([np.asarray(part) for part in parts])

    def _expert_token_counts(self, forward: Any, weights: Mapping[ParamPath, Any], inputs: Array) -> Array:
        rows = self._settings.batch_size
        parts = [_count_expert_tokens(forward, weights, inputs[at : at + rows]) for at in range(0, len(inputs), rows)]
        return np.sum([np.asarray(part) for part in parts], axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _apply(forward: Any, weights: Mapping[ParamPath, Any], inputs: jax.Array) -> jax.Array:
    return forward(weights, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _count_expert_tokens(forward: Any, weights: Mapping[ParamPath, Any], inputs: jax.Array) -> jax.Array:
    return forward.loads(weights, inputs)


def _learn_mask(path: ParamPath, weight: jax.Array, loads: Array | None) -> jax.Array:
    if loads is not None and path in (("moe", "gate"), ("moe", "up"), ("moe", "down")):
        return jnp.asarray(loads >= MIN_EXPERT_TOKENS, jnp.float32)
    return jnp.ones(weight.shape[:-2], jnp.float32)


def _note(part: str, before: float, after: float, loads: Array | None) -> str:
    kept = "" if after < before else " (kept as the search left it)"
    few = [] if loads is None else np.flatnonzero(loads < MIN_EXPERT_TOKENS).tolist()
    listed = f"; experts with under {MIN_EXPERT_TOKENS} tokens, left to the search: {few}" if few else ""
    return f"{part}: mean squared error of its output {before:.3e} -> {after:.3e}{kept}{listed}"
