"""Products with weights in every form: few rows or many, one weight or a stack, arrays or bits."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glm_jax.ops.linear import embed_tokens, index_weight, linear, per_head_linear
from glm_jax.weights import Bfloat16Bits

RNG = np.random.default_rng(50)
STACK = RNG.standard_normal((2, 3, 7, 20)).astype(ml_dtypes.bfloat16)  # [layers, experts, out, in]
EXACT = STACK.astype(np.float64)
FORMS: dict[str, Any] = {
    "float32": jnp.asarray(STACK.astype(np.float32)),
    "bfloat16": jnp.asarray(STACK),
    "bits": Bfloat16Bits.from_array(STACK),
}


@pytest.mark.parametrize("weight", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize("traced", [False, True], ids=["fixed_index", "traced_index"])
@pytest.mark.parametrize("width", [2560, 8], ids=["whole", "in_parts"])
def test_linear(weight: Any, rows: int, traced: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For float32 inputs the result is exact up to float32 rounding."""
    monkeypatch.setattr("glm_jax.weights.dense_matmul._FUSED_WIDTH", width)
    x = RNG.standard_normal((rows, 20)).astype(np.float32)
    if traced:
        out = jax.jit(lambda x, i, j: linear(x, weight, i, j))(x, jnp.int32(1), jnp.int32(2))
    else:
        out = linear(jnp.asarray(x), weight, 1, 2)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, x.astype(np.float64) @ EXACT[1, 2].T, atol=1e-5)


@pytest.mark.parametrize("weight", [FORMS["bfloat16"], FORMS["bits"]], ids=["bfloat16", "bits"])
@pytest.mark.parametrize("rows", [1, 5])
def test_bfloat16_is_rounded_once(weight: Any, rows: int) -> None:
    """Products of bfloat16 numbers accumulate in float32; only the result is rounded, unless float32 is requested."""
    x = RNG.standard_normal((rows, 20)).astype(ml_dtypes.bfloat16)
    exact = x.astype(np.float64) @ EXACT[0, 1].T
    wide = jax.jit(lambda x, i: linear(x, weight, i, 1, dtype=jnp.dtype(jnp.float32)))(x, jnp.int32(0))
    np.testing.assert_allclose(wide, exact, atol=1e-5)
    rounded = jax.jit(lambda x, i: linear(x, weight, i, 1))(x, jnp.int32(0))
    assert rounded.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(rounded), np.asarray(wide).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients(rows: int) -> None:
    x = RNG.standard_normal((rows, 20)).astype(np.float32)
    along = RNG.standard_normal((rows, 7)).astype(np.float32)

    def loss(x: jax.Array, stack: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.sum(linear(x, stack, i, 1) * along)

    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, FORMS["float32"], jnp.int32(1))
    np.testing.assert_allclose(dx, along @ EXACT[1, 1], atol=1e-5)
    np.testing.assert_allclose(dw[1, 1], along.T @ x, atol=1e-5)
    assert not np.asarray(dw.at[1, 1].set(0.0)).any()


@pytest.mark.parametrize("weight", FORMS.values(), ids=FORMS)
def test_heads(weight: Any) -> None:
    """``[experts, out, in]`` as heads: each head has its own matrix, or the transpose of it."""
    x, y = (RNG.standard_normal((2, 4, 3, size)).astype(np.float32) for size in (20, 7))
    out = jax.jit(lambda x, i: per_head_linear(x, weight, i))(x, jnp.int32(1))
    np.testing.assert_allclose(out, np.einsum("btni,noi->btno", x.astype(np.float64), EXACT[1]), atol=1e-5)
    back = jax.jit(lambda y, i: per_head_linear(y, weight, i, transpose=True))(y, jnp.int32(1))
    np.testing.assert_allclose(back, np.einsum("btno,noi->btni", y.astype(np.float64), EXACT[1]), atol=1e-5)


@pytest.mark.parametrize("weight", FORMS.values(), ids=FORMS)
def test_pick_and_embed_are_exact(weight: Any) -> None:
    picked = jax.jit(lambda i: index_weight(weight, i, 2))(jnp.int32(1))
    assert np.array_equal(np.asarray(picked).astype(np.float64), EXACT[1, 2])
    table = jax.tree.map(lambda leaf: leaf[0, 0], weight)
    rows = jax.jit(lambda t: embed_tokens(table, t, first_row=10))(jnp.asarray([[10, 16, 9, 17]]))
    assert rows.dtype == weight.dtype
    expected = np.stack([EXACT[0, 0, 0], EXACT[0, 0, 6], np.zeros(20), np.zeros(20)])
    assert np.array_equal(np.asarray(rows)[0].astype(np.float64), expected)
