"""The metrics of the model card, measured on held-out data with the stored weights."""

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
    """Computes all metrics.

    Args:
        cfg: Architecture of the model.
        params: Parameters in float32, with the values of the stored weights.
        tokenizer: The miniature's tokenizer.
        held_out: Library files that were held out from training.
        render: Renders conversations with the chat template.
    """
    texts = [file.text for file in held_out]
    rows = _token_rows(tokenizer, texts)
    accepted_on_text, loads = _mtp_acceptance_and_loads(cfg, params, rows)
    accepted_on_output, _ = _mtp_acceptance_and_loads(cfg, params, _greedy_continuations(cfg, params, rows))
    _, chat_loads = _mtp_acceptance_and_loads(cfg, params, _token_rows(tokenizer, _conversation_texts(render)))
    return {
        "python": platform.python_version(),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in texts),
        "window": WINDOW,
        "bits_per_byte": round(bits_per_byte(cfg, params, tokenizer, texts, window=WINDOW, stride=WINDOW // 2), 4),
        "bits_per_byte_xz": round(xz_bits_per_byte(texts), 4),
        "chat": held_out_tasks.summarize_scores(score_held_out_tasks(cfg, params, tokenizer, render)),
        "mtp_acceptance": {
            "held_out_text": round(float(accepted_on_text.mean()), 4),
            "own_text": round(float(accepted_on_output[:, PROMPT_TOKENS:].mean()), 4),
        },
        "expert_load": {
            "library": _expert_load_extremes(cfg, loads),
            "conversations": _expert_load_extremes(cfg, chat_loads),
        },
    }


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits per byte of ``xz -9e``, which compresses each text on its own."""
    data = [text.encode() for text in texts]
    compressed = sum(len(lzma.compress(d, preset=9 | lzma.PRESET_EXTREME)) for d in data)
    return 8 * compressed / sum(map(len, data))


def score_held_out_tasks(
    cfg: Config, params: Any, tokenizer: Tokenizer, render: Render
) -> list[held_out_tasks.TaskScore]:
    """Scores of greedy answers to the held-out chat tasks."""
    items = held_out_tasks.evaluation_conversations()
    prompts = [tokenizer.encode(item.prompt(render)).ids for item in items]
    answers = generate_greedy(cfg, params, prompts, ANSWER_TOKENS, cfg.eos_token_ids)
    return [
        held_out_tasks.score_answer(held_out_tasks.to_record(item), *_answer_text(cfg, tokenizer, answer))
        for item, answer in zip(items, answers, strict=True)
    ]


def _answer_text(cfg: Config, tokenizer: Tokenizer, ids: list[int]) -> tuple[str, str | None]:
    """The text of an answer and the special token that ended it, if any."""
    ended = bool(ids) and ids[-1] in cfg.eos_token_ids
    end = tokenizer.id_to_token(ids[-1]) if ended else None
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
    return text, end if end in SPECIAL_TOKENS else None


def _token_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int = 513) -> np.ndarray:
    """Up to 64 evenly spaced rows of the joined texts, ``int32 [B, length]``."""
    ids = [i for encoding in tokenizer.encode_batch(list(texts)) for i in encoding.ids]
    count = min(64, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def _conversation_texts(render: Render) -> list[str]:
    rng = Random("expert load")
    return [sample_conversation(rng).text(render) for _ in range(500)]


def _greedy_continuations(cfg: Config, params: Any, rows: np.ndarray) -> np.ndarray:
    prompts = rows[:PROMPTS, :PROMPT_TOKENS]
    output = generate_greedy(cfg, params, prompts.tolist(), ANSWER_TOKENS, stop_ids=())
    return np.concatenate([prompts, np.asarray(output, np.int32)], axis=1)


def _mtp_acceptance_and_loads(cfg: Config, params: Any, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Whether drafts are the model's greedy tokens, ``bool [B, T - 2]``, and router loads ``[l, E]`` by path."""
    batches = [_inspect_batch(cfg, params, jnp.asarray(rows[i : i + 8])) for i in range(0, len(rows), 8)]
    loads = {path: np.sum([np.asarray(load[path]) for _, load in batches], axis=0) for path in batches[0][1]}
    return np.concatenate([np.asarray(accepted) for accepted, _ in batches]), loads


@functools.partial(jax.jit, static_argnums=0)
def _inspect_batch(cfg: Config, params: Any, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    out = forward(cfg, params, tokens, with_mtp=True)
    assert out.draft is not None
    # The draft at position p and the model at p + 1 both predict token p + 2.
    return jnp.argmax(out.draft[:, :-1], -1) == jnp.argmax(out.logits[:, 1:], -1), out.loads


def _expert_load_extremes(cfg: Config, loads: dict[str, np.ndarray]) -> dict[str, Any]:
    """Loads of each router's busiest and idlest expert, as multiples of the mean load."""
    named = {
        f"layer {group.start + i}": loads[f"runs/{g}"][i]
        for g, group in enumerate(cfg.layer_groups)
        for i in range(group.count)
        if group.kind == "sparse"
    }
    shares = {name: load / load.mean() for name, load in {**named, "mtp": loads["mtp"][0]}.items()}
    return {
        name: {"busiest": round(float(s.max()), 3), "idlest": round(float(s.min()), 3)} for name, s in shares.items()
    }
