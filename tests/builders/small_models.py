"""Small models for the tests of the network: the module and the NumPy reference on the same random tensors."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from glm_jax.cache import LatentCache
from glm_jax.config import Config
from tests.builders.hf_checkpoints import Tensors, random_tensors, to_device, to_params
from tests.builders.hf_configs import HfConfig, from_scratch_config, odd_size_config
from tests.builders.jitted_model import Array, JittedModel
from tests.reference import ReferenceModel


@dataclass(frozen=True)
class SmallModel:
    """A random model; `router_bias_shift` moves every router bias, `own_mtp` gives the MTP layer its own embedding."""

    config: HfConfig
    seed: int = 0
    own_mtp: bool = False
    router_bias_shift: float = 0.0

    @cached_property
    def tensors(self) -> Tensors:
        drawn = random_tensors(self.config, self.seed, own_mtp=self.own_mtp)
        shift = np.float32(self.router_bias_shift)
        return {name: a + shift if name.endswith("correction_bias") else a for name, a in drawn.items()}

    @cached_property
    def cfg(self) -> Config:
        return Config.from_hf(self.config).replace(mtp_own_embeddings=self.own_mtp)

    @cached_property
    def params(self) -> Any:
        return to_device(to_params(self.tensors, self.cfg))

    @cached_property
    def reference(self) -> ReferenceModel:
        return ReferenceModel(self.tensors, self.config)

    @cached_property
    def jitted_model(self) -> JittedModel:
        return JittedModel(self.cfg, self.params)

    def apply(self, *inputs: Array, **options: Any) -> Any:
        return self.jitted_model.apply(*inputs, **options)

    def cache(self, batch: int, capacity: int, layers: int | None = None) -> LatentCache:
        return self.jitted_model.cache(batch, capacity, layers)


# Three layers where a scan over two equal ones matters, else two: hooks unroll the layers.
MODEL_VARIANTS: dict[str, SmallModel] = {
    "odd": SmallModel(odd_size_config(), seed=0),
    "groups": SmallModel(odd_size_config(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4), seed=1),
    "groups_below_zero": SmallModel(
        odd_size_config(n_routed_experts=15, n_group=5, topk_group=2, num_experts_per_tok=4, num_hidden_layers=2),
        seed=2,
        router_bias_shift=-3.0,
    ),
    "raw_weights": SmallModel(
        odd_size_config(norm_topk_prob=False, routed_scaling_factor=2.5, n_shared_experts=3, num_hidden_layers=2),
        seed=3,
    ),
    "no_shared_expert": SmallModel(odd_size_config(n_shared_experts=0, num_hidden_layers=2), seed=4),
    "full_rank_queries": SmallModel(odd_size_config(q_lora_rank=None, rope_interleave=False), seed=5),
    "tied": SmallModel(odd_size_config(tie_word_embeddings=True, num_hidden_layers=2), seed=6),
    "alternating": SmallModel(
        from_scratch_config(
            **odd_size_config(num_hidden_layers=4), mlp_layer_types=["sparse", "dense", "dense", "sparse"]
        ),
        seed=7,
    ),
    "many_experts": SmallModel(
        odd_size_config(n_routed_experts=48, num_experts_per_tok=4, num_hidden_layers=2, num_nextn_predict_layers=0),
        seed=8,
    ),
    "one_expert": SmallModel(odd_size_config(n_routed_experts=1, num_experts_per_tok=1, num_hidden_layers=2), seed=9),
    "one_dense_layer": SmallModel(odd_size_config(num_hidden_layers=1), seed=10),
    "all_experts": SmallModel(odd_size_config(num_experts_per_tok=7, num_hidden_layers=2), seed=11),
}
OWN_MTP_MODEL = SmallModel(odd_size_config(num_hidden_layers=1), seed=12, own_mtp=True)
