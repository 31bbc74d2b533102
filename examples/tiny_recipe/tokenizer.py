"""The miniature's tokenizer: byte-level BPE with GLM's special tokens after the learned vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LEARNED_VOCAB = 1996
MODEL_VOCAB = 2048
# Line breaks with the indentation after them are one pre-token, and each digit is one; the rest follows cl100k.
PRETOKENIZER_PATTERN = r"\n+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?!\S)|\s"
# In the order of the original tokenizer, whose special ids start at 154820.
SPECIAL_TOKENS = tuple(
    """<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>
    <|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|begin_of_audio|> <|end_of_audio|>
    <|begin_of_transcription|> <|end_of_transcription|>
    <|code_prefix|> <|code_middle|> <|code_suffix|>
    <think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key>
    <arg_value> </arg_value> /nothink <|begin_of_box|> <|end_of_box|> <|image|> <|video|>""".split()
)
# Added tokens that are part of the text: decoding keeps them when it drops special tokens.
NON_SPECIAL_TOKENS = frozenset(
    t for t in SPECIAL_TOKENS if t[:1] == "<" and t[1:2] != "|" and t not in ("<sop>", "<eop>")
)
SPECIAL_IDS = {token: LEARNED_VOCAB + i for i, token in enumerate(SPECIAL_TOKENS)}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learns the tokenizer; the same texts in the same order give the same tokenizer.

    Raises:
        RuntimeError: if the texts are too small for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_VOCAB, initial_alphabet=alphabet, show_progress=False, max_token_length=24
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=t not in NON_SPECIAL_TOKENS, normalized=False) for t in SPECIAL_TOKENS])
    if tokenizer.token_to_id(SPECIAL_TOKENS[0]) != LEARNED_VOCAB or tokenizer.get_vocab_size() != LEARNED_VOCAB + len(
        SPECIAL_TOKENS
    ):
        raise RuntimeError(f"the texts are too small for a vocabulary of {LEARNED_VOCAB} learned tokens")
    return tokenizer
