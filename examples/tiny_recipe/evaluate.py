"""The figures of the card, measured on held-out data with the weights as they are stored."""

from __future__ import annotations

import functools
import lzma
import platform
from collections.abc import Sequence
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.tiny_recipe import held_out_tasks
from examples.tiny_recipe.bits_per_byte import bits_per_byte
from examples.tiny_recipe.conversations import Render, sample_conversation
from examples.tiny_recipe.corpus import LibraryFile
from examples.tiny_recipe.greedy_decode import generate_greedy
from examples.tiny_recipe.loss import forward
from examples.tiny_recipe.tokenizer import SPECIAL_TOKENS
from glm_jax.config import Config

ANSWER_TOKENS = 64
WINDOW = 512
PROMPTS, PROMPT_TOKENS = 64, 64


def evaluate(
    cfg: Config, params: Any, tokenizer: Tokenizer, held_out: Sequence[LibraryFile], render: Render
) -> dict[str, Any]:
    """All figures.

    Args:
        params: float32, with the values of the stored weights.
        held_out: the library files kept from training.
    """
    texts = [file.text for file in held_out]
    rows = _rows(tokenizer, texts)
    on_text, loads = _inspect(cfg, params, rows)
    on_own, _ = _inspect(cfg, params, _greedy_continuations(cfg, params, rows))
    _, chat_loads = _inspect(cfg, params, _rows(tokenizer, _conversations(render)))
    return {
        "python": platform.python_version(),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in texts),
        "window": WINDOW,
        "bits_per_byte": round(bits_per_byte(cfg, params, tokenizer, texts, window=WINDOW, stride=WINDOW // 2), 4),
        "bits_per_byte_xz": round(xz_bits_per_byte(texts), 4),
        "chat": held_out_tasks.summarize_scores(score_held_out_tasks(cfg, params, tokenizer, render)),
        "mtp_acceptance": {
            "held_out_text": round(float(on_text.mean()), 4),
            "own_text": round(float(on_own[:, PROMPT_TOKENS:].mean()), 4),
        },
        "expert_load": {
            "library": _expert_load_extremes(cfg, loads),
            "conversations": _expert_load_extremes(cfg, chat_loads),
        },
    }


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits per byte of ``xz -9e`` on each text alone."""
    data = [text.encode() for text in texts]
    packed = sum(len(lzma.compress(d, preset=9 | lzma.PRESET_EXTREME)) for d in data)
    return 8 * packed / sum(map(len, data))


def score_held_out_tasks(
    cfg: Config, params: Any, tokenizer: Tokenizer, render: Render
) -> list[held_out_tasks.TaskScore]:
    """The marks of greedy answers to the held-out chat tasks."""
    items = held_out_tasks.evaluation_conversations()
    prompts = [tokenizer.encode(item.prompt(render)).ids for item in items]
    answers = generate_greedy(cfg, params, prompts, ANSWER_TOKENS, cfg.eos_token_ids)
    return [
        held_out_tasks.score_answer(held_out_tasks.to_record(i), *_text(cfg, tokenizer, a))
        for i, a in zip(items, answers, strict=True)
    ]


def _text(cfg: Config, tokenizer: Tokenizer, ids: list[int]) -> tuple[str, str | None]:
    ended = bool(ids) and ids[-1] in cfg.eos_token_ids
    end = tokenizer.id_to_token(ids[-1]) if ended else None
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
    return text, end if end in SPECIAL_TOKENS else None


def _rows(tokenizer: Tokenizer, texts: Sequence[str], length: int = 513) -> np.ndarray:
    ids = [i for encoding in tokenizer.encode_batch(list(texts)) for i in encoding.ids]
    count = min(64, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def _conversations(render: Render) -> list[str]:
    rng = Random("expert load")
    return [sample_conversation(rng).text(render) for _ in range(500)]


def _greedy_continuations(cfg: Config, params: Any, rows: np.ndarray) -> np.ndarray:
    prompts = rows[:PROMPTS, :PROMPT_TOKENS]
    written = generate_greedy(cfg, params, prompts.tolist(), ANSWER_TOKENS, stop_ids=())
    return np.concatenate([prompts, np.asarray(written, np.int32)], axis=1)


def _inspect(cfg: Config, params: Any, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Where the draft is the model's own greedy choice, bool [rows, T-2]; each router's load, [l, E] by block."""
    parts = [_inspect_part(cfg, params, jnp.asarray(rows[i : i + 8])) for i in range(0, len(rows), 8)]
    loads = {block: np.sum([np.asarray(load[block]) for _, load in parts], axis=0) for block in parts[0][1]}
    return np.concatenate([np.asarray(hits) for hits, _ in parts]), loads


@functools.partial(jax.jit, static_argnums=0)
def _inspect_part(cfg: Config, params: Any, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    out = forward(cfg, params, tokens, with_mtp=True)
    assert out.draft is not None
    # The draft made at p and the model at p+1 both name token p+2.
    return jnp.argmax(out.draft[:, :-1], -1) == jnp.argmax(out.logits[:, 1:], -1), out.loads


def _expert_load_extremes(cfg: Config, loads: dict[str, np.ndarray]) -> dict[str, Any]:
    """Each router's busiest and idlest expert, as multiples of the mean load."""
    named = {
        f"layer {run.start + i}": loads[f"runs/{r}"][i]
        for r, run in enumerate(cfg.layer_groups)
        for i in range(run.count)
        if run.kind == "sparse"
    }
    shares = {name: load / load.mean() for name, load in {**named, "mtp": loads["mtp"][0]}.items()}
    return {
        name: {"busiest": round(float(s.max()), 3), "idlest": round(float(s.min()), 3)} for name, s in shares.items()
    }
