"""Loading and saving parameters: every source gives the same tree, on one device and over a mesh."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.pipeline import convert_checkpoint
from glm_jax import checkpoint
from glm_jax.errors import CheckpointError, ShardingError
from glm_jax.sharding import get_sharding_preset, make_mesh
from glm_jax.weights import Bfloat16Bits
from glm_jax.weights.params import leaves_with_path
from glm_jax.weights.storage import abstract_params
from tests.builders import hf_checkpoints, hf_configs
from tests.checkpoint.assertions import assert_same_tensors

CONFIG = hf_configs.odd_size_config()
# Sizes that divide over four devices.
EVEN = hf_configs.odd_size_config(
    num_attention_heads=8,
    num_key_value_heads=8,
    moe_intermediate_size=16,
    vocab_size=132,
    intermediate_size=56,
    n_routed_experts=8,
)
FORMS = ("huggingface", "converted", "exported")


def make_folders(base, config, **options):
    """One model in all three forms."""
    folders = {form: base / form for form in FORMS}
    hf_checkpoints.write_checkpoint(folders["huggingface"], config, hf_checkpoints.random_tensors(config, 0, **options))
    convert_checkpoint(folders["huggingface"], folders["converted"])
    convert_checkpoint(folders["converted"], folders["exported"], to="safetensors")
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("odd"), CONFIG, dtype=hf_checkpoints.BFLOAT16)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("even"), EVEN)


def values(leaf):
    """A parameter's values, however it is stored."""
    return np.asarray(leaf.bits).view(leaf.dtype) if isinstance(leaf, Bfloat16Bits) else np.asarray(leaf)


def same(params, wanted):
    """Fails unless two trees have the same paths, dtypes and bits."""
    left, right = dict(leaves_with_path(params)), dict(leaves_with_path(wanted))
    assert left.keys() == right.keys()
    for path in left:
        a, b = values(left[path]), values(right[path])
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        assert a.tobytes() == b.tobytes(), path


def by_hand(folder, cfg, dtype):
    return hf_checkpoints.to_params(hf_checkpoints.read_tensors(folder), cfg, jnp.dtype(dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("check", [False, True])
def test_every_form_gives_the_tree(folders, form, dtype, check):
    cfg, params, info = checkpoint.load(folders[form], dtype=dtype, check=check)
    same(params, by_hand(folders["huggingface"], cfg, dtype))
    assert info.kind == ("converted" if form == "converted" else "huggingface")
    assert info.folder == folders[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (hf_configs.odd_size_config(q_lora_rank=None), {}),
        (hf_configs.odd_size_config(tie_word_embeddings=True), {}),
        (hf_configs.odd_size_config(num_nextn_predict_layers=0, first_k_dense_replace=3), {}),
        (hf_configs.odd_size_config(first_k_dense_replace=0, n_shared_experts=2), {"own_mtp": True}),
        (hf_configs.from_scratch_config(**hf_configs.ODD_SIZES), {}),
        (hf_configs.resaved_config(**hf_configs.ODD_SIZES), {"dtype": np.float16}),
    ],
    ids=["full-rank", "tied", "dense", "own-mtp", "from-scratch", "float16"],
)
def test_variants(tmp_path, form, config, options):
    folders = make_folders(tmp_path, config, **options)
    cfg, params, _ = checkpoint.load(folders[form], dtype="float32")
    same(params, by_hand(folders["huggingface"], cfg, "float32"))


def test_mixed_layer_kinds(tmp_path):
    """Runs that alternate: each layer goes to its own place."""
    config = hf_configs.from_scratch_config(**hf_configs.ODD_SIZES, mlp_layer_types=["dense", "sparse", "dense"])
    hf_checkpoints.write_checkpoint(tmp_path / "hf", config, hf_checkpoints.random_tensors(config, 0))
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    for folder in ("hf", "ours"):
        cfg, params, _ = checkpoint.load(tmp_path / folder, dtype="float32")
        assert list(params["runs"]) == ["0", "1", "2"]
        same(params, by_hand(tmp_path / "hf", cfg, "float32"))


@pytest.mark.parametrize("form", FORMS)
def test_tree_is_what_was_announced(folders, form):
    cfg, params, _ = checkpoint.load(folders[form], dtype="bfloat16")
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(cfg, "bfloat16"))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == shapes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["replicated", "latency"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mesh(even, form, name, dtype):
    mesh, rules = make_mesh(4), get_sharding_preset(name)
    cfg, params, _ = checkpoint.load(even[form], dtype=dtype, mesh=mesh, rules=rules)
    same(params, by_hand(even["huggingface"], cfg, dtype))
    wanted = dict(leaves_with_path(abstract_params(cfg, dtype, rules, mesh)))
    for path, leaf in leaves_with_path(params):
        array = leaf.bits if isinstance(leaf, Bfloat16Bits) else leaf
        assert array.sharding.is_equivalent_to(wanted[path].sharding, array.ndim), path


def test_mesh_that_does_not_divide(folders):
    with pytest.raises(ShardingError, match="5 attention heads"):
        checkpoint.load(folders["huggingface"], mesh=make_mesh(4), rules=get_sharding_preset("latency"))


@pytest.mark.parametrize("form", FORMS)
def test_without_the_prediction_layer(folders, form):
    cfg, params, _ = checkpoint.load(folders[form], dtype="float32", mtp=False)
    assert cfg.num_nextn_predict_layers == 0
    assert "mtp" not in params
    same(params, by_hand(folders["huggingface"], cfg, "float32"))


def test_open_source_can_be_loaded_later(folders):
    source = checkpoint.open_source(folders["converted"])
    _, params, info = checkpoint.load(source, dtype="float32")
    assert info is source.info
    same(params, by_hand(folders["huggingface"], source.cfg, "float32"))


def test_synthetic_models_are_the_initializers():
    from glm_jax.checkpoint.sources.synthetic import SyntheticSource, SyntheticSpec
    from glm_jax.config import Config
    from glm_jax.weights.random_init import init_params

    cfg = Config.from_hf(hf_configs.odd_size_config(num_hidden_layers=2, num_nextn_predict_layers=0))
    source = SyntheticSource(SyntheticSpec(cfg, 5), np.dtype(np.float32), "synthetic:odd")
    loaded, params, info = checkpoint.load(source, dtype="float32")
    assert loaded == cfg
    assert info.folder is None
    same(params, init_params(cfg, 5, "float32"))


def test_synthetic_conversion_is_the_synthetic_model(tmp_path):
    from glm_jax.checkpoint.sources.synthetic import SyntheticSource, SyntheticSpec
    from glm_jax.config import Config

    cfg = Config.from_hf(hf_configs.odd_size_config(num_hidden_layers=2))
    source = SyntheticSource(SyntheticSpec(cfg, 5), np.dtype(np.float32), "synthetic:odd")
    convert_checkpoint(source, tmp_path / "hf", to="safetensors")
    read, params, _ = checkpoint.load(tmp_path / "hf", dtype="float32")
    assert read == cfg
    same(params, checkpoint.load(source, dtype="float32")[1])
    names = hf_checkpoints.tensor_shapes(hf_configs.odd_size_config(num_hidden_layers=2))
    assert {name: t.shape for name, t in hf_checkpoints.read_tensors(tmp_path / "hf").items()} == names


@pytest.mark.parametrize("form", FORMS)
def test_bad_values_are_listed_on_request(tmp_path, form):
    tensors = hf_checkpoints.random_tensors(CONFIG, 0, dtype=hf_checkpoints.BFLOAT16)
    tensors["model.layers.2.mlp.experts.6.down_proj.weight"][3, 3] = np.nan
    tensors["model.layers.0.self_attn.kv_b_proj.weight"][-1, 0] = np.inf
    hf_checkpoints.write_checkpoint(tmp_path / "huggingface", CONFIG, tensors)
    convert_checkpoint(tmp_path / "huggingface", tmp_path / "converted")
    convert_checkpoint(tmp_path / "converted", tmp_path / "exported", to="safetensors")
    checkpoint.load(tmp_path / form)
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        checkpoint.load(tmp_path / form, check=True)
    assert "layer-00000/attn.v_b (1), layer-00002/moe.down (1)" in str(caught.value)


def test_flipped_bit_is_found_on_request(folders, tmp_path):
    folder = shutil.copytree(folders["converted"], tmp_path / "ours")
    path = folder / "parts" / "mtp" / "moe.gate" / "c" / "4" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    checkpoint.load(folder)
    with pytest.raises(CheckpointError, match=r"not those of the manifest: mtp/moe\.gate"):
        checkpoint.load(folder, check=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load(folders, tmp_path, dtype):
    cfg, params, info = checkpoint.load(folders["huggingface"], dtype=dtype)
    checkpoint.save(tmp_path / "saved", cfg, params, origin=info)
    again, loaded, other = checkpoint.load(tmp_path / "saved", dtype=dtype, check=True)
    assert again == cfg
    assert other.dtype == dtype
    same(loaded, params)


def test_save_keeps_what_the_original_had(folders, tmp_path):
    """Loaded, saved and exported without a change, a checkpoint is what it was."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folders["huggingface"] / name).write_text(name)
    cfg, params, info = checkpoint.load(folders["huggingface"], dtype="bfloat16")
    checkpoint.save(tmp_path / "out", cfg, params, origin=info, to="safetensors")
    assert_same_tensors(folders["huggingface"], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"


def test_save_from_a_mesh(even, tmp_path):
    mesh, rules = make_mesh(4), get_sharding_preset("latency")
    cfg, params, info = checkpoint.load(even["huggingface"], dtype="float32", mesh=mesh, rules=rules)
    with jax.set_mesh(mesh):
        checkpoint.save(tmp_path / "saved", cfg, params, origin=info)
    same(checkpoint.load(tmp_path / "saved", dtype="float32")[1], params)


def test_save_equal_parameters_twice(folders, tmp_path):
    cfg, params, info = checkpoint.load(folders["huggingface"], dtype="float32")
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, cfg, params, origin=info)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_save_over_another_needs_force(folders, tmp_path):
    cfg, params, _ = checkpoint.load(folders["huggingface"], dtype="float32")
    checkpoint.save(tmp_path / "saved", cfg, params)
    changed = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    with pytest.raises(CheckpointError, match="--force"):
        checkpoint.save(tmp_path / "saved", cfg, changed)
    checkpoint.save(tmp_path / "saved", cfg, changed, force=True)
    same(checkpoint.load(tmp_path / "saved", dtype="float32")[1], changed)


def test_save_without_origin(folders, tmp_path):
    cfg, params, _ = checkpoint.load(folders["huggingface"], dtype="float32")
    checkpoint.save(tmp_path / "saved", cfg.replace(latent_eps=1e-5), params)
    assert checkpoint.open_source(tmp_path / "saved").cfg.latent_eps == 1e-5


def test_save_refuses_another_tree(folders, tmp_path):
    cfg, params, _ = checkpoint.load(folders["huggingface"], dtype="float32")
    odd = {key: value for key, value in params.items() if key != "norm"}
    odd["embed"] = jnp.zeros((3, 3))
    odd["surprise"] = jnp.zeros(3)
    odd["head"] = params["head"].astype(jnp.int32)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path / "saved", cfg, odd)
    for words in ("missing: norm", "unknown: surprise", "wrong shape: embed", "float32: head"):
        assert words in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_progress_is_on_stderr(folders, capsys):
    checkpoint.load(folders["converted"], dtype="float32", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("loading: 0.00 of 0.00 GB")
    checkpoint.load(folders["converted"], dtype="float32")
    assert capsys.readouterr().err == ""
