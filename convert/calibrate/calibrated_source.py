"""A source whose layers are quantised one after the other, each on what the quantised layers before it give."""

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

from convert.calibrate.block_forward import Block, Prediction
from convert.calibrate.calibration_data import Calibration
from convert.calibrate.saved_state import State, latest_notes, load_state, save_state
from convert.calibrate.signround import Settings, can_learn, start_from, tune
from glm_jax.checkpoint.folder.layout import MTP, REST, Leaf, layout
from glm_jax.checkpoint.sources.base import Array, Piece, WeightSource, plain
from glm_jax.checkpoint.sources.quantized import Requantised, refuse_not_finite
from glm_jax.errors import MemoryPlanError
from glm_jax.memory.devices import device_limit
from glm_jax.ops.norm import rms_norm
from glm_jax.weights import QuantizedTensor, QuantRules, dequantize
from glm_jax.weights.params import Path

# Experts that see fewer tokens than this keep what the search found: rounding learnt on less fits only these tokens.
LEAST_TOKENS = 64
_ARRAYS = 6  # float32 copies of a layer: weights, offsets, gradients, soft weights, and their updates


class CalibratedSource(Requantised):
    """Weights quantised with learned rounding; see :mod:`convert.calibrate.signround`.

    Embedding and head, and matrices whose storage is not of plain integers, are quantised by the search for the least
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
        quant: QuantRules,
        calibration: Calibration = Calibration(),
        settings: Settings = Settings(),
        *,
        dtype: Any = "bfloat16",
        keep: Collection[Path] = (),
    ) -> None:
        super().__init__(base, quant, "mse", dtype=dtype, keep=keep)
        self._tokens = calibration.tokens(base.cfg, base.info.folder)
        self._settings = settings
        self._parts = [part for part in layout(self.cfg) if part != REST]
        self._walk: State | None = None
        self._made: tuple[str, dict[str, QuantizedTensor]] = ("", {})
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
        return latest_notes(self._folder, self.fingerprint()) if self._walk is None else self._walk.notes

    def state_bytes(self) -> int:
        """What is kept on disk between layers, at most."""
        one = 8 * self._tokens.size * self.cfg.hidden_size
        return one * (len(self._parts) + 1 if self._keep_all else 3)

    def memory_bytes(self) -> int:
        """An estimate of what the largest layer needs."""
        values = max(sum(leaf.size for leaf in members) for part, members in layout(self.cfg).items() if part != REST)
        streams = 3 * self._tokens.size * self.cfg.hidden_size
        return 4 * (_ARRAYS * values + streams)

    def require_memory(self) -> None:
        """Raises :class:`~glm_jax.errors.MemoryPlanError` if the largest layer does not fit."""
        needed, free = self.memory_bytes(), device_limit(jax.devices()[0])
        if needed > free:
            raise MemoryPlanError(
                f"learned rounding needs about {needed / 1e9:.1f} GB for one layer ({_ARRAYS} float32 arrays of its "
                f"size, and the text's activations), {free / 1e9:.1f} GB are free: use --method mse, or a machine "
                "with more memory"
            )

    def pieces(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Piece]]:
        """Learnt weights whole; the rest as the search gives them."""
        spec = self.storage(leaf)
        if leaf.part == REST or spec is None or not can_learn(spec):
            yield from super().pieces(leaf, start, stop)
            return
        whole = self._layer(leaf.part)[leaf.name]
        yield (start, whole[start:stop]) if len(leaf.shape) > 2 else (0, whole)

    def _layer(self, part: str) -> dict[str, QuantizedTensor]:
        if self._made[0] != part:
            index = self._parts.index(part)
            walk = self._walk if self._walk and self._walk.index == index else None
            walk = walk or load_state(self._folder, index, self.fingerprint())
            if walk is None:  # nothing that was kept leads here, so the layers before are learnt again
                if index:
                    self._layer(self._parts[index - 1])
                    walk = self._walk
                else:
                    walk = State(0, self._embedded(quantised=False), self._embedded(quantised=True), ())
            assert walk is not None
            self._walk, made = self._learn(part, walk)
            self._made = (part, made)
            save_state(self._folder, self._walk, self.fingerprint(), keep_all=self._keep_all)
        return self._made[1]

    def _learn(self, part: str, walk: State) -> tuple[State, dict[str, QuantizedTensor]]:
        members = {leaf.path: leaf for leaf in layout(self.cfg)[part]}
        weights = {path: self._value(leaf) for path, leaf in members.items()}
        forward = Prediction(self.cfg) if part == MTP else Block(self.cfg)
        exact, seen = (walk.exact, walk.seen) if part != MTP else self._prediction_inputs(walk)
        targets = self._through(forward, weights, exact)
        start = {
            path: start_from(weights[path], spec, self._dtype)
            for path, leaf in members.items()
            if (spec := self.storage(leaf))
        }
        loads = self._loads(forward, weights, seen) if ("moe", "router") in members else None
        learn = {path: _mask(path, weights[path], loads) for path in start if can_learn(start[path].spec)}
        step = 1.0 / self._settings.steps
        tuned, before, after = tune(
            forward, weights, start, learn, seen, targets, self._settings, lambda n: self._advance(n * step)
        )
        notes = (*walk.notes, _note(part, before, after, loads))
        if part != MTP:
            held = {**weights, **{path: dequantize(weight) for path, weight in tuned.items()}}
            walk = State(walk.index + 1, targets, self._through(forward, held, seen), notes)
        on_host = {path: weight.map(lambda _, array: np.asarray(array)) for path, weight in tuned.items()}
        return dataclasses.replace(walk, notes=notes), {members[path].name: weight for path, weight in on_host.items()}

    def _value(self, leaf: Leaf) -> jax.Array:
        """A whole array in float32, on the device."""
        out = np.empty(leaf.shape, np.float32)
        for row, piece in self._values(self.base_leaf(leaf), 0, None):
            values = np.asarray(piece)
            out[row : row + len(values)] = values
        refuse_not_finite(out, leaf)
        return jnp.asarray(out)

    def _embedded(self, *, quantised: bool) -> Array:
        """The text's embeddings ``[N, T, D]``."""
        (leaf,) = (leaf for leaf in layout(self.cfg)[REST] if leaf.name == "embed")
        return self._rows(leaf, self._tokens, quantised=quantised)

    def _rows(self, leaf: Leaf, tokens: Array, *, quantised: bool) -> Array:
        out = np.empty((*tokens.shape, leaf.shape[-1]), np.float32)
        pieces = super().pieces(leaf) if quantised else self._values(self.base_leaf(leaf), 0, None)
        for row, piece in pieces:
            values = plain(piece) if isinstance(piece, QuantizedTensor) else np.asarray(piece)
            here = (tokens >= row) & (tokens < row + len(values))
            out[here] = values[tokens[here] - row]
        return out

    def _prediction_inputs(self, walk: State) -> tuple[Array, Array]:
        """Embeddings of the next tokens beside the final states, of both models."""
        parts = layout(self.cfg)
        own = [leaf for leaf in parts[MTP] if leaf.name == "embed"]
        table = own[0] if own else next(leaf for leaf in parts[REST] if leaf.name == "embed")
        norm = self._value(next(leaf for leaf in parts[REST] if leaf.name == "norm"))

        def joined(states: Array, *, quantised: bool) -> Array:
            embedded = self._rows(table, self._tokens[:, 1:], quantised=quantised)
            final = np.asarray(rms_norm(jnp.asarray(states[:, :-1]), norm, self.cfg.rms_norm_eps))
            return np.concatenate([embedded, final], axis=-1)

        return joined(walk.exact, quantised=False), joined(walk.seen, quantised=True)

    def _through(self, forward: Any, weights: Mapping[Path, Any], inputs: Array) -> Array:
        rows = self._settings.rows
        parts = [_apply(forward, weights, inputs[at : at + rows]) for at in range(0, len(inputs), rows)]
        return np.concatenate([np.asarray(part) for part in parts])

    def _loads(self, forward: Any, weights: Mapping[Path, Any], inputs: Array) -> Array:
        rows = self._settings.rows
        parts = [_count(forward, weights, inputs[at : at + rows]) for at in range(0, len(inputs), rows)]
        return np.sum([np.asarray(part) for part in parts], axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _apply(forward: Any, weights: Mapping[Path, Any], inputs: jax.Array) -> jax.Array:
    return forward(weights, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _count(forward: Any, weights: Mapping[Path, Any], inputs: jax.Array) -> jax.Array:
    return forward.loads(weights, inputs)


def _mask(path: Path, weight: jax.Array, loads: Array | None) -> jax.Array:
    if loads is not None and path in (("moe", "gate"), ("moe", "up"), ("moe", "down")):
        return jnp.asarray(loads >= LEAST_TOKENS, jnp.float32)
    return jnp.ones(weight.shape[:-2], jnp.float32)


def _note(part: str, before: float, after: float, loads: Array | None) -> str:
    kept = "" if after < before else " (kept as the search left it)"
    few = [] if loads is None else np.flatnonzero(loads < LEAST_TOKENS).tolist()
    listed = f"; experts with under {LEAST_TOKENS} tokens, left to the search: {few}" if few else ""
    return f"{part}: mean squared error of its output {before:.3e} -> {after:.3e}{kept}{listed}"
