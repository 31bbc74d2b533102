"""Preparations of a run: the tokenizer and the texts of the probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from examples.tiny_recipe.conversations import Render, sample_conversation
from examples.tiny_recipe.corpus import LibraryFile
from examples.tiny_recipe.tokenizer import train_tokenizer

TOKENIZER_CONVERSATIONS = 4000


def load_or_train_tokenizer(folder: Path, training: Sequence[LibraryFile], render: Render) -> Tokenizer:
    """Loads the tokenizer of a run's folder; learns and saves it first if there is none."""
    path = folder / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    rng = Random("tokenizer")
    chat = [sample_conversation(rng).text(render) for _ in range(TOKENIZER_CONVERSATIONS)]
    tokenizer = train_tokenizer([f.text for f in training] + chat)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def probe_texts(held_out: Sequence[LibraryFile], size: int) -> list[str]:
    """The beginnings of some held-out files, about ``size`` characters in total."""
    texts: list[str] = []
    for file in held_out[::4]:
        texts.append(file.text[:3000])
        if sum(map(len, texts)) >= size:
            break
    return texts
