"""glm-jax as a backend: decoding can start repeatedly, and random weights are the same in tiles."""

import jax
import numpy as np
import pytest

from glm_jax.bench.glm_jax_backend import GlmJaxBackend
from glm_jax.bench.random_weights import random_quantized_params
from glm_jax.config import Config
from glm_jax.weights import QUANT_PRESETS, QuantizedTensor, TiledWeight
from glm_jax.weights.params import leaves_with_path
from glm_jax.weights.storage import quantized_bytes


@pytest.mark.parametrize("cache", ["float32", "int8", "fp8"])
def test_decoding_starts_repeatedly_from_the_same_state(cache):
    backend = GlmJaxBackend("tiny", "float32", cache_dtype=cache)
    state = backend.start_with_random_cache(3, 40, 6)
    assert state.cache.cache_dtype == cache
    assert (state.cache.batch, state.cache.capacity) == (4, 128)
    first, second = (backend.decode(state, 6)[1] for _ in range(2))
    assert first.shape == (4, 6)
    assert (first[:3] >= 0).all()
    assert (first[3] == -1).all()  # pads the batch
    np.testing.assert_array_equal(first, second)
    assert len({tuple(tokens) for tokens in first[:3].tolist()}) > 1  # the sequences' caches differ


def small_flash():
    """Returns a small config whose widths are multiples of a tile."""
    cfg = Config.flash(layers=2)
    return cfg.replace(
        vocab_size=128, hidden_size=128, num_attention_heads=2, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=32,
        v_head_dim=32, qk_rope_head_dim=32, intermediate_size=192, moe_intermediate_size=64, n_routed_experts=4,
        num_nextn_predict_layers=0, eos_token_ids=(3,), pad_token_id=3,
    )  # fmt: skip


def test_random_weights_are_the_same_in_tiles_and_not():
    cfg, rules = small_flash(), QUANT_PRESETS["int4"]  # experts in 4 bits, the rest in 8
    tiled, plain = (
        dict(leaves_with_path(random_quantized_params(cfg, rules, "float32", tiles=tiles))) for tiles in (True, False)
    )
    quantized = [path for path, weight in plain.items() if isinstance(weight, QuantizedTensor)]
    assert len(quantized) > 15
    assert {type(tiled[path]) for path in quantized if path != ("embed",)} == {TiledWeight}
    for path in plain:
        actual, expected = np.asarray(tiled[path], np.float32), np.asarray(plain[path], np.float32)
        np.testing.assert_array_equal(actual, expected, err_msg="/".join(path))
        if path in quantized and actual.size > 4000:
            std = 1.0 if path == ("embed",) else actual.shape[-1] ** -0.5
            assert 0.9 * std < actual.std() < 1.2 * std
            assert abs(actual.mean()) < 0.1 * std
    nbytes = sum(x.nbytes for weight in plain.values() for x in jax.tree.leaves(weight))
    assert nbytes == quantized_bytes(cfg, rules, "float32")
