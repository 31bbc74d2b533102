"""Changes that shrink the miniature's config, for tests in which only shapes matter."""

TINY_OVERRIDES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "mlp_layer_types": ("dense", "sparse"),
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
}
