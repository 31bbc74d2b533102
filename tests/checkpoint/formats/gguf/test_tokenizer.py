"""The tokenizer of a GGUF file equals the original tokenizer: same ids, same text."""

import json
from importlib.resources import files

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from glm_jax.checkpoint.formats.gguf import open_gguf
from glm_jax.checkpoint.formats.gguf.tokenizer import build_asset_files
from glm_jax.config import Config
from glm_jax.engine.assets import ModelAssets
from glm_jax.errors import CheckpointError
from glm_jax.text import Tokenizer
from tests.builders.gguf_files import architecture_fields, small_mtp_config, to_gguf_tensors, write_gguf
from tests.builders.hf_checkpoints import random_tensors
from tests.text.fixtures import CORPUS, GLM_SPECIAL_TOKENS, TAG_TOKENS

# Split pattern of GLM-4's tokenizer.json.
GLM4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = [
    *CORPUS,
    "I'm sure we'll say they'VE 1234567 things, don't we?\r\n\r\n  \tYes!!!\n\n\n   x  ",
    "[gMASK]<sop><|user|>\nHi <think>one</think><tool_call>f</tool_call><|endoftext|>",
    "for i in range(10):\n\tprint(f'{i:03d}')  # 天气 café e\u0301 ＡＢ ½ Ⅷ ١٢٣٤\n" * 2,
]
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ROWS = 420  # rows of the embedding; there are fewer tokens


@pytest.fixture(scope="module")
def original():
    """A tokenizer of GLM's kind, with GLM-4's split pattern."""
    tokenizer_model = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(GLM4), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer_model.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer_model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer_model.train_from_iterator(TEXTS * 3, trainer)
    tokenizer_model.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in GLM_SPECIAL_TOKENS]
    )
    tokenizer_model.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAG_TOKENS])
    return tokenizer_model


def vocabulary_fields(tokenizer_model, rows=ROWS):
    """Metadata fields that llama.cpp's converter writes for a tokenizer."""
    state = json.loads(tokenizer_model.to_str())
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id = {i: token for token, i in tokenizer_model.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [
        (CONTROL if added[i]["special"] else USER_DEFINED) if i in added else NORMAL if i in by_id else UNUSED
        for i in range(rows)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    stops = [tokenizer_model.token_to_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer_model.token_to_id("[gMASK]"),
        "tokenizer.ggml.eos_token_id": stops[0],
        "tokenizer.ggml.eot_token_id": stops[1],
        "tokenizer.ggml.eom_token_id": stops[2],
        "tokenizer.ggml.padding_token_id": stops[0],
        "tokenizer.chat_template": "[gMASK]<sop>{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def read(fields):
    """Fields as the header reader returns them: lists of strings as lists of bytes, lists of numbers as arrays."""
    return {key: _as_read(value) if isinstance(value, list) else value for key, value in fields.items()}


def _as_read(value):
    return [text.encode() for text in value] if isinstance(value[0], str) else np.array(value)


BARE = {"max_position_embeddings": 9, "eos_token_id": [], "pad_token_id": None}
CONFIG = small_mtp_config(vocab_size=ROWS)


@pytest.fixture(scope="module")
def opened(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    fields = architecture_fields(CONFIG) | vocabulary_fields(original)
    sampling = {"general.sampling.temp": 0.7, "general.sampling.top_p": 0.95, "general.sampling.top_k": 20}
    return open_gguf(write_gguf(path, to_gguf_tensors(random_tensors(CONFIG, 0), CONFIG), fields | sampling))


@pytest.fixture(scope="module")
def folder(opened, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    for name, raw in opened.asset_files().items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_dir(folder, model_vocab=ROWS)


TRICKY = [
    *GLM_SPECIAL_TOKENS,
    *TAG_TOKENS,
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "'ſ",
    "1",
    "12",
    "天气",
    "🙂",
    "e\u0301",
    "[PAD419]",
]
texts = st.lists(st.sampled_from(TRICKY) | st.sampled_from(TEXTS) | st.text(max_size=12), max_size=8).map("".join)


@given(text=texts)
def test_ids_are_those_of_the_original(original, tokenizer, text):
    ids = original.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == original.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_whole_texts(original, tokenizer, text):
    for start in range(0, len(text), 3):
        piece = text[start:]
        assert tokenizer.encode(piece) == original.encode(piece, add_special_tokens=False).ids


def test_unused_rows_and_special_tokens(original, tokenizer):
    known = original.get_vocab_size(with_added_tokens=True)
    assert tokenizer.vocab_size == known
    assert tokenizer.unused_ids == tuple(range(known, ROWS))
    assert tokenizer.special_ids == {original.token_to_id(text) for text in GLM_SPECIAL_TOKENS}
    assert tokenizer.encode("[PAD419]") != [419]


def test_the_miniature_s_own_vocabulary(tmp_path):
    """Its rule for cutting text is another, so only the merging can be compared: of words that both keep whole."""
    theirs = tokenizers.Tokenizer.from_file(str(files("glm_jax") / "tiny" / "tokenizer.json"))
    tokenizer_model = build_asset_files(read(vocabulary_fields(theirs, 2048)), BARE, "m.gguf")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_model["tokenizer.json"])
    ours = Tokenizer.from_dir(tmp_path, model_vocab=2048)
    words = [*theirs.get_vocab(with_added_tokens=False)][:1500]
    pieces = [theirs.decoder.decode([word]) for word in words]
    whole = [p for p in pieces if p.isalpha() or (p[:1] == " " and p[1:].isalpha())]
    assert len(whole) > 500
    for piece in whole:
        for text in (piece, piece + "zq", piece[:-1]):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_everything_that_lies_beside_a_checkpoint(opened, folder, original):
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assets = ModelAssets.load(Config.from_hf(opened.config), folder)
    stops = [original.token_to_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert assets.eos_ids == tuple(stops)
    assert assets.chat_template == "[gMASK]<sop>{% for m in messages %}{{ m.content }}{% endfor %}"
    assert (
        assets.default_sampling_params.temperature,
        assets.default_sampling_params.top_p,
        assets.default_sampling_params.top_k,
    ) == (0.7, 0.95, 20)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|endoftext|>", "<|endoftext|>")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == stops
    assert generation["pad_token_id"] == stops[0]


def test_no_template_no_file_and_no_limit_no_number(original):
    fields = read(vocabulary_fields(original)) | {"general.sampling.top_k": 0}
    del fields["tokenizer.chat_template"]
    tokenizer_model = build_asset_files(fields, BARE, "m.gguf")
    assert set(tokenizer_model) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert json.loads(tokenizer_model["generation_config.json"]) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, r"m\.gguf has no tokenizer: take the tokenizer\.json of the original model"),
        ({"model": "llama"}, r"has a tokenizer of kind 'llama' / 'glm4'; GLM-4\.7-Flash has 'gpt2' / 'glm4'"),
        ({"pre": "llama-bpe"}, "of kind 'gpt2' / 'llama-bpe'"),
        ({"pre": None}, "of kind 'gpt2' / None"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens must be a list of strings"),
        ({"tokens": np.zeros(3)}, r"tokenizer\.ggml\.tokens must be a list of strings"),
        ({"tokens": [b"\xff"]}, r"tokenizer\.ggml\.tokens is not UTF-8 text"),
        ({"merges": None}, r"tokenizer\.ggml\.merges must be a list of strings"),
        ({"merges": [b"a"]}, "the merge 'a' does not join two tokens into a third"),
        ({"merges": [b"a b c"]}, "the merge 'a b c' does not join"),
        ({"merges": [b"zzz a"]}, "the merge 'zzz a' does not join"),
        ({"token_type": None}, "token_type must be one number for each of the 420 tokens"),
        ({"token_type": np.ones(3, np.int32)}, "token_type must be one number for each of the 420 tokens"),
        ({"token_type": np.full(ROWS, 9)}, "token_type has the unknown kind 9"),
        ({"tokens": [b"x"] * ROWS, "token_type": np.ones(ROWS, int)}, "has the token 'x' twice"),
        ({"eos_token_id": 10_000}, r"eos_token_id is 10000, and there are 420 tokens"),
        ({"padding_token_id": -3}, "padding_token_id must be a whole number, not -3"),
    ],
)
def test_tokenizers_that_cannot_be_used(original, changes, words):
    fields = read(vocabulary_fields(original)) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=words):
        build_asset_files(fields, BARE, "m.gguf")


def test_weights_load_without_a_tokenizer(tmp_path):
    opened = open_gguf(
        write_gguf(tmp_path / "m.gguf", to_gguf_tensors(random_tensors(CONFIG, 0), CONFIG), architecture_fields(CONFIG))
    )
    assert opened.weights["model.norm.weight"].load(None).shape == (40,)
    with pytest.raises(CheckpointError, match=r"m\.gguf has no tokenizer"):
        opened.asset_files()


def test_the_older_name_of_the_same_rule(original):
    fields = read(vocabulary_fields(original))
    older = build_asset_files(fields | {"tokenizer.ggml.pre": "chatglm-bpe"}, BARE, "m.gguf")
    assert older == build_asset_files(fields, BARE, "m.gguf")


def test_added_tokens_between_others_keep_their_numbers(original, tmp_path):
    """With unused rows before the added tokens they would be numbered anew, were they not in the vocabulary."""
    fields = read(vocabulary_fields(original))
    kinds = fields["tokenizer.ggml.token_type"]
    tokens, shift = fields["tokenizer.ggml.tokens"], 5
    first = int(np.argmax(kinds != NORMAL))
    fields["tokenizer.ggml.tokens"] = [*tokens[:first], *(b"[GAP%d]" % i for i in range(shift)), *tokens[first:]]
    fields["tokenizer.ggml.token_type"] = np.insert(kinds, first, [UNUSED] * shift)
    (tmp_path / "tokenizer.json").write_bytes(build_asset_files(fields, BARE, "m.gguf")["tokenizer.json"])
    ours = Tokenizer.from_dir(tmp_path, model_vocab=ROWS + shift)
    for text in TEXTS:
        ids = original.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == [i + shift if i >= first else i for i in ids]
