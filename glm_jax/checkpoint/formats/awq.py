"""AWQ, version gemm, and AutoRound's layout of the same kind: integers along the outputs, runs of eight interleaved.

``qweight`` int32 [I, O·b/32], ``qzeros`` int32 [G, O·b/32], ``scales`` [G, O]; zero points are stored as they are.
"""

from __future__ import annotations

from glm_jax.checkpoint.formats.base import SCALES, Module, Stored, block_size, scale_kind
from glm_jax.checkpoint.formats.bit_packing import AWQ_PLACES, awq_nibbles, awq_order, unpack, word_count
from glm_jax.checkpoint.formats.integers import Integers, Layout, stored_integers
from glm_jax.checkpoint.formats.quantization_config import Declared, Description

BITS = range(4, 8)


def layout_problem(description: Description) -> str | None:
    """Why such a file is not read, or None if it is."""
    section, method = description.section, description.method
    if method == "auto-round":
        said, known = description.packing, ("auto_round:auto_awq",)
    elif method == "awq":
        keys = ("version", "format", "checkpoint_format")
        said, known = str(next((section[key] for key in keys if section.get(key)), "gemm")).lower(), ("gemm",)
    else:
        return f"the configuration describes {method or 'no quantisation'}, but the tensors are AWQ's"
    return None if said in known else f"AWQ's layout {said} is not read (known is {known[0]})"


def read_awq(module: Module, declared: Declared) -> Stored:
    """A module of ``qweight``, ``qzeros`` and ``scales``.

    Raises:
        CheckpointError: if tensors are missing, or contradict each other or the configuration.
    """
    inputs, words = module.need("qweight", ("I32",), 2).shape
    scale = module.need("scales", tuple(SCALES), 2)
    groups, outputs = scale.shape
    module.need_shape("qzeros", ("I32",), (groups, words))
    fitting = [bits for bits in BITS if word_count(outputs, bits) == words and declared.bits in (None, bits)]
    if len(fitting) != 1 or outputs % len(AWQ_PLACES):
        said = f" of {declared.bits} bits" if declared.bits else ""
        raise module.error(f"{outputs} outputs{said} are not packed into {words} words")
    layout = Layout(
        shape=(outputs, inputs),
        bits=fitting[0],
        group=block_size(module, inputs, groups, declared.group, "inputs"),
        scale=scale_kind(scale),
        zero="none" if declared.symmetric else "point",
    )
    return stored_integers(module, layout, lambda row: _unpack(module, layout))


def _unpack(module: Module, layout: Layout) -> Integers:
    outputs, bits = layout.shape[0], layout.bits
    nibbles, words = bits == 4 and layout.spec is not None, module.read("qweight")
    codes = awq_nibbles(words) if nibbles else awq_order(unpack(words, bits, outputs)).T
    zeros = awq_order(unpack(module.read("qzeros"), bits, outputs)).T
    if layout.zero == "none":
        middle = 1 << (bits - 1)
        if (zeros != middle).any():
            raise module.error(f"the configuration says symmetric, but not all zero points are {middle}")
        zeros = None
    return Integers(codes, module.read("scales").T, zeros, nibbles=nibbles)
