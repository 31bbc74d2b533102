"""A source with learned rounding: each layer is tuned on the outputs of the quantized layers before it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from convert.calibrate.block_forward import BlockForward, MtpForward, Weights
from convert.calibrate.calibration_data import CalibrationConfig
from convert.calibrate.saved_state import CalibrationState, load_latest_notes, load_state, save_state
from convert.calibrate.signround import SignRoundConfig, quantize_by_search, supports_signround, tune_block
from glm_jax.checkpoint.finiteness import require_finite
from glm_jax.checkpoint.folder.layout import MTP, NON_LAYER, Leaf, checkpoint_layout
from glm_jax.checkpoint.sources.base import Array, WeightChunk, WeightSource
from glm_jax.checkpoint.sources.quantized import RequantizedSource
from glm_jax.errors import MemoryPlanError
from glm_jax.memory.devices import available_device_memory
from glm_jax.ops.norm import rms_norm
from glm_jax.weights import QuantizedTensor, QuantRules, dequantize
from glm_jax.weights.params import ParamPath

# Experts with fewer tokens keep the result of the search, because learned rounding would overfit so little text.
MIN_EXPERT_TOKENS = 64
_FLOAT32_COPIES = 6  # float32 copies of a layer: weights, offsets, gradients, soft weights, and their updates


class CalibratedSource(RequantizedSource):
    """Weights quantized with learned rounding; see :mod:`convert.calibrate.signround`.

    Embedding, head, and matrices stored as anything but plain integers are quantized by searching each scale for the
    least squared error.

    Args:
        base: Source of the values.
        quant_rules: Quantization of each kind of matrix.
        calibration: Calibration text.
        config: Settings of the gradient descent.
        dtype: Dtype of the model.
        exclude: Paths of parameters that are never quantized, whatever ``quant_rules`` says.

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
        dtype: DTypeLike = "bfloat16",
        exclude: Collection[ParamPath] = (),
    ) -> None:
        super().__init__(base, quant_rules, "mse", dtype=dtype, exclude=exclude)
        self._tokens = calibration.load_windows(base.cfg, base.info.folder)
        self._config = config
        self._layer_names = [name for name in checkpoint_layout(self.cfg) if name != NON_LAYER]
        self._state: CalibrationState | None = None
        self._learned: tuple[str, dict[str, QuantizedTensor]] = ("", {})  # the latest layer, and its weights by name
        self._folder: Path | None = None
        self._keep_all = False
        self._advance: Callable[[float], None] = lambda fraction: None

    def fingerprint(self) -> str:
        """Returns a hash of the base class's fingerprint, the calibration text and the settings."""
        tokens = hashlib.sha256(self._tokens.tobytes()).hexdigest()
        # This text is a fixed format: conversions in progress resume only if it stays the same.
        settings = f"Settings(steps={self._config.steps}, rows={self._config.batch_size}, seed={self._config.seed})"
        return hashlib.sha256(f"{super().fingerprint()} {tokens} {settings}".encode()).hexdigest()

    def start_conversion(self, folder: Path, *, keep_all: bool) -> None:
        """Keeps calibration states in ``folder``: the newest, or all of them for output files that span layers."""
        self._folder, self._keep_all = folder, keep_all

    def on_progress(self, advance: Callable[[float], None]) -> None:
        """Registers a callback that receives each newly finished fraction of a layer's gradient descent."""
        self._advance = advance

    def conversion_notes(self) -> tuple[str, ...]:
        """Returns a sentence on each layer tuned so far."""
        return load_latest_notes(self._folder, self.fingerprint()) if self._state is None else self._state.notes

    def state_bytes(self) -> int:
        """Returns the largest number of bytes kept on disk between layers."""
        per_state = 8 * self._tokens.size * self.cfg.hidden_size  # two float32 arrays [N, T, D]
        return per_state * (len(self._layer_names) + 1 if self._keep_all else 3)

    def memory_bytes(self) -> int:
        """Estimates the memory in bytes for tuning the largest layer."""
        layer_sizes = (
            sum(leaf.size for leaf in members)
            for name, members in checkpoint_layout(self.cfg).items()
            if name != NON_LAYER
        )
        activations = 3 * self._tokens.size * self.cfg.hidden_size
        return 4 * (_FLOAT32_COPIES * max(layer_sizes) + activations)

    def require_memory(self) -> None:
        """Checks that the largest layer can be tuned.

        Raises:
            MemoryPlanError: if memory is too small.
        """
        needed, free = self.memory_bytes(), available_device_memory(jax.devices()[0])
        if needed > free:
            raise MemoryPlanError(
                f"learned rounding needs about {needed / 1e9:.1f} GB for one layer ({_FLOAT32_COPIES} float32 arrays "
                f"of its size, and the text's activations), {free / 1e9:.1f} GB are free: use --method mse, or a "
                "machine with more memory"
            )

    def iter_chunks(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, WeightChunk]]:
        """Yields tuned weights as one chunk, and all others as the base class does."""
        spec = self.quant_spec(leaf)
        if leaf.checkpoint_name == NON_LAYER or spec is None or not supports_signround(spec):
            yield from super().iter_chunks(leaf, start, stop)
            return
        whole = self._learned_layer(leaf.checkpoint_name)[leaf.name]
        yield (start, whole[start:stop]) if len(leaf.shape) > 2 else (0, whole)

    def _learned_layer(self, name: str) -> dict[str, QuantizedTensor]:
        """Returns the tuned weights of a layer by name; tunes the layer, and those before it, if necessary."""
        if self._learned[0] != name:
            state = self._state_before(self._layer_names.index(name))
            self._state, weights = self._tune_layer(name, state)
            self._learned = (name, weights)
            save_state(self._folder, self._state, self.fingerprint(), keep_all=self._keep_all)
        return self._learned[1]

    def _state_before(self, index: int) -> CalibrationState:
        """Returns the inputs of a layer: from memory, from disk, or by tuning the layers before it."""
        if self._state and self._state.layer_index == index:
            return self._state
        if saved := load_state(self._folder, index, self.fingerprint()):
            return saved
        if index == 0:
            return CalibrationState(0, self._embed(quantized=False), self._embed(quantized=True), ())
        self._learned_layer(self._layer_names[index - 1])
        assert self._state is not None  # the call above has set it
        return self._state

    def _tune_layer(self, name: str, state: CalibrationState) -> tuple[CalibrationState, dict[str, QuantizedTensor]]:
        """Tunes one layer; returns the inputs of the next layer, and the tuned weights by name."""
        leaves = {leaf.path: leaf for leaf in checkpoint_layout(self.cfg)[name]}
        weights = {path: self._load_array(leaf) for path, leaf in leaves.items()}
        forward = MtpForward(self.cfg) if name == MTP else BlockForward(self.cfg)
        reference_inputs, quantized_inputs = self._layer_inputs(name, state)
        targets = self._run_forward(forward, weights, reference_inputs)
        initial = {
            path: quantize_by_search(weights[path], spec, self._dtype)
            for path, leaf in leaves.items()
            if (spec := self.quant_spec(leaf))
        }
        has_experts = ("moe", "router") in leaves
        token_counts = self._count_expert_tokens(forward, weights, quantized_inputs) if has_experts else None
        learn_mask = {
            path: _learn_mask(path, weights[path], token_counts)
            for path in initial
            if supports_signround(initial[path].spec)
        }
        step = 1.0 / self._config.steps
        tuned, before, after = tune_block(
            forward,
            weights,
            initial,
            learn_mask,
            quantized_inputs,
            targets,
            self._config,
            lambda n: self._advance(n * step),
        )
        notes = (*state.notes, _layer_note(name, before, after, token_counts))
        if name != MTP:
            soft_weights = {**weights, **{path: dequantize(weight) for path, weight in tuned.items()}}
            outputs = self._run_forward(forward, soft_weights, quantized_inputs)
            state = CalibrationState(state.layer_index + 1, targets, outputs, notes)
        on_host = {path: weight.map_components(lambda _, array: np.asarray(array)) for path, weight in tuned.items()}
        return dataclasses.replace(state, notes=notes), {leaves[path].name: weight for path, weight in on_host.items()}

    def _load_array(self, leaf: Leaf) -> jax.Array:
        """Returns a whole array in float32, on the device."""
        out = np.empty(leaf.shape, np.float32)
        for row, chunk in self._iter_values(self.base_leaf(leaf), 0, None):
            values = np.asarray(chunk)
            out[row : row + len(values)] = values
        require_finite(out, leaf)
        return jnp.asarray(out)

    def _embed(self, *, quantized: bool) -> Array:
        """Returns the embeddings of the calibration text, float32 ``[N, T, D]``."""
        (leaf,) = (leaf for leaf in checkpoint_layout(self.cfg)[NON_LAYER] if leaf.name == "embed")
        return self._gather_rows(leaf, self._tokens, quantized=quantized)

    def _gather_rows(self, leaf: Leaf, tokens: Array, *, quantized: bool) -> Array:
        """Returns the rows of an embedding ``[V, D]`` for token ids ``int32 [N, T]``, as float32 ``[N, T, D]``."""
        out = np.empty((*tokens.shape, leaf.shape[-1]), np.float32)
        chunks = super().iter_chunks(leaf) if quantized else self._iter_values(self.base_leaf(leaf), 0, None)
        for row, chunk in chunks:
            values = np.asarray(chunk)
            in_chunk = (tokens >= row) & (tokens < row + len(values))
            out[in_chunk] = values[tokens[in_chunk] - row]
        return out

    def _layer_inputs(self, name: str, state: CalibrationState) -> tuple[Array, Array]:
        """Returns a layer's inputs in the unquantized and in the quantized model, each float32 ``[N, T, D]``.

        The inputs of the prediction layer are float32 ``[N, T - 1, 2 D]``: next tokens' embeddings, then final states.
        """
        if name != MTP:
            return state.reference_inputs, state.quantized_inputs
        layout = checkpoint_layout(self.cfg)
        embed = next(leaf for leaf in (*layout[MTP], *layout[NON_LAYER]) if leaf.name == "embed")
        norm = self._load_array(next(leaf for leaf in layout[NON_LAYER] if leaf.name == "norm"))

        def mtp_inputs(states: Array, *, quantized: bool) -> Array:
            embedded = self._gather_rows(embed, self._tokens[:, 1:], quantized=quantized)
            final = np.asarray(rms_norm(jnp.asarray(states[:, :-1]), norm, self.cfg.rms_norm_eps))
            return np.concatenate([embedded, final], axis=-1)

        return mtp_inputs(state.reference_inputs, quantized=False), mtp_inputs(state.quantized_inputs, quantized=True)

    def _run_forward(self, forward: BlockForward | MtpForward, weights: Weights, inputs: Array) -> Array:
        batches = [_apply(forward, weights, batch) for batch in self._batches(inputs)]
        return np.concatenate([np.asarray(batch) for batch in batches])

    def _count_expert_tokens(self, forward: BlockForward | MtpForward, weights: Weights, inputs: Array) -> Array:
        """Returns the number of tokens that are routed to each expert, int32 ``[E]``."""
        counts = [_count_expert_tokens(forward, weights, batch) for batch in self._batches(inputs)]
        return np.sum([np.asarray(count) for count in counts], axis=0)

    def _batches(self, inputs: Array) -> Iterator[Array]:
        size = self._config.batch_size
        return (inputs[start : start + size] for start in range(0, len(inputs), size))


@functools.partial(jax.jit, static_argnums=0)
def _apply(forward: BlockForward | MtpForward, weights: Mapping[ParamPath, jax.Array], inputs: Array) -> jax.Array:
    return forward(weights, jnp.asarray(inputs))


@functools.partial(jax.jit, static_argnums=0)
def _count_expert_tokens(
    forward: BlockForward | MtpForward, weights: Mapping[ParamPath, jax.Array], inputs: Array
) -> jax.Array:
    return forward.count_expert_tokens(weights, jnp.asarray(inputs))


def _learn_mask(path: ParamPath, weight: jax.Array, expert_token_counts: Array | None) -> jax.Array:
    """Returns float32 ``[*stack]``: 1 for each matrix to tune, 0 for experts with too few tokens."""
    if expert_token_counts is not None and path in (("moe", "gate"), ("moe", "up"), ("moe", "down")):
        return jnp.asarray(expert_token_counts >= MIN_EXPERT_TOKENS, jnp.float32)
    return jnp.ones(weight.shape[:-2], jnp.float32)


def _layer_note(name: str, before: float, after: float, expert_token_counts: Array | None) -> str:
    kept = "" if after < before else " (the result of the search is kept)"
    few = [] if expert_token_counts is None else np.flatnonzero(expert_token_counts < MIN_EXPERT_TOKENS).tolist()
    listed = f"; experts with under {MIN_EXPERT_TOKENS} tokens, left to the search: {few}" if few else ""
    return f"{name}: mean squared error of its output {before:.3e} -> {after:.3e}{kept}{listed}"
