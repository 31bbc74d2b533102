"""The notebook object: load a model, generate, chat, stream, look inside."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax import checkpoint, prompts, steps
from glm_jax.checkpoint import SourceInfo
from glm_jax.compile_cache import use_compile_cache
from glm_jax.completion import ChatCompletion, Completion, Piece, Score, Timing
from glm_jax.config import Config
from glm_jax.decoding import Runner
from glm_jax.errors import GlmError, SamplingError
from glm_jax.model import GLM
from glm_jax.prompts import Prompt
from glm_jax.rows import Row
from glm_jax.sampling import SamplingParams, completion_seeds
from glm_jax.sharding import Rules, make_mesh, preset
from glm_jax.text import Delta, OutputParser, Tokenizer, opens_thinking, parse_output, read_template, render_chat

_MAX_ROWS = 64


class LLM:
    """A loaded model; make one with :meth:`load`.

    Attributes:
        model: the Flax module; ``model.apply({"params": llm.params}, ...)`` is a pure function.
        params: nested dictionary of arrays.
        config: the architecture.
        mesh: the devices, or None for one.
        tokenizer: text to ids and back.
        defaults: sampling options used where a call gives none (from the checkpoint's generation_config.json).
        max_model_len: longest prompt and completion together.
        timing: of the last call.
    """

    def __init__(
        self,
        cfg: Config,
        params: steps.Params,
        *,
        tokenizer: Tokenizer,
        info: SourceInfo | None = None,
        rules: Rules = Rules(),
        mesh: Mesh | None = None,
        cache_dtype: Any = None,
        max_model_len: int | None = None,
        defaults: SamplingParams | None = None,
        template: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.config, self.mesh, self.tokenizer = cfg, mesh, tokenizer
        self.model = GLM(cfg, rules)
        self.defaults = defaults or SamplingParams()
        self.max_model_len = min(max_model_len or cfg.max_position_embeddings, cfg.max_position_embeddings)
        self.timing = Timing()
        self._params: steps.Params | None = params
        # XLA:CPU would widen a bfloat16 cache as a whole at every layer; float32 holds the same values.
        on_cpu = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform == "cpu"
        self._cache_dtype = cache_dtype or (jnp.dtype(jnp.float32) if on_cpu else params["embed"].dtype)
        self._template, self._info = template, info
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()

    @classmethod
    def load(
        cls,
        source: str | Path = "tiny",
        *,
        dtype: str = "bfloat16",
        cache_dtype: str | None = None,
        mesh: int | Mesh | None = None,
        sharding: str | None = None,
        max_model_len: int | str = "auto",
        latent_eps: float | None = None,
        seed: int | None = None,
        check: bool = False,
        progress: bool | None = None,
    ) -> Self:
        """Loads a model.

        Args:
            source: "tiny" (the built-in miniature), a Hugging Face folder or hub id, a converted folder, or
                "synthetic:flash?layers=4&seed=0" (random weights, full width).
            dtype: "bfloat16" or "float32", of weights and activations.
            cache_dtype: of the latent cache; that of the weights unless given.
            mesh: number of devices, or a mesh with axes ("data", "model"); one device unless given.
            sharding: layout on the mesh, "latency" (the default: heads and widths split) or "replicated".
            max_model_len: longest prompt and completion together; "auto" is what the model and the memory allow.
            latent_eps: epsilon of the norms inside the attention: 1e-6 as in transformers unless given; serving engines
                have 1e-5.
            seed: makes the seeds drawn for requests without one repeatable.
            check: also look for NaN and infinite weights, and verify hashes.
            progress: show a progress bar on stderr; by default for weights over 1 GB.

        Raises:
            CheckpointError, ConfigError, ShardingError: what is wrong with the source or the mesh.
            MemoryPlanError: if it cannot fit, with the arithmetic.
        """
        use_compile_cache()
        if dtype not in ("bfloat16", "float32"):
            raise GlmError(f'dtype must be "bfloat16" or "float32", not {dtype!r}')
        weights = checkpoint.open_source(source, dtype=dtype)
        rules = preset(sharding or ("latency" if mesh not in (None, 1) else "replicated"))
        devices = None if mesh is None else make_mesh(mesh)
        limit = _context_limit(weights.cfg, max_model_len)
        show = weights.total_bytes() > 1 << 30 if progress is None else progress
        cfg, params, info = checkpoint.load(weights, dtype=dtype, rules=rules, mesh=devices, check=check, progress=show)
        if latent_eps is not None:
            cfg = cfg.replace(latent_eps=latent_eps)
        folder = info.folder
        return cls(
            cfg,
            params,
            tokenizer=prompts.load_tokenizer(cfg, folder),
            info=info,
            rules=rules,
            mesh=devices,
            cache_dtype=None if cache_dtype is None else jnp.dtype(cache_dtype),
            max_model_len=limit,
            defaults=_generation_defaults(folder),
            template=None if folder is None else read_template(folder),
            seed=seed,
        )

    @property
    def params(self) -> steps.Params:
        """The parameters, a nested dictionary of arrays."""
        if self._params is None:
            raise GlmError("this model was released; load it again")
        return self._params

    @params.setter
    def params(self, params: steps.Params) -> None:
        """Replaces the parameters, by fine-tuned ones for example."""
        self._params = params

    @overload
    def generate(self, prompts: Prompt, params: SamplingParams | None = None, **options: Any) -> Any: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> list[Any]: ...
    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **options: Any) -> Any:
        """Completes one prompt or many.

        Args:
            prompts: text or token ids, or a list of these.
            params: sampling options; the checkpoint's defaults unless given.
            options: single sampling options, over ``params``.

        Returns:
            A :class:`~glm_jax.completion.Completion` for one prompt, a list for a list; with ``n > 1`` a list of ``n`` in
            place of each.

        Raises:
            PromptError: if a prompt is empty or longer than the context.
            SamplingError: if an option is impossible.
        """
        many, ids = self._ids(prompts)
        chosen = self._params_of(params, options)
        rows = [row for order, prompt in enumerate(ids) for row in self._rows(prompt, chosen, order)]
        self._finish(rows)
        results: list[list[Completion]] = [[] for _ in ids]
        for row in rows:
            results[row.order].append(row.completion())
        shaped = [r if chosen.n > 1 else r[0] for r in results]
        return shaped if many else shaped[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[Piece]:
        """Completes one prompt piece by piece; leaving the loop, or Ctrl-C, ends it and leaves the model usable.

        Arguments as in :meth:`generate`.
        """
        _, ids = self._ids([prompt])
        rows = self._rows(ids[0], self._params_of(params, options), 0)
        self.timing = Timing()
        return (piece for _, piece in self._runner().run(rows, self.timing, stream=True))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Answers a conversation.

        Args:
            messages: in OpenAI's form.
            params: sampling options.
            tools: functions the model may call, in OpenAI's form.
            tool_choice: "auto" or "none" (calls are left out).
            stream: yield :class:`~glm_jax.text.Delta` pieces instead of returning the whole.
            options: sampling options, and switches of the chat template such as ``enable_thinking=False``.

        Returns:
            A :class:`~glm_jax.completion.ChatCompletion` (a list of them with ``n > 1``), or an iterator of deltas.
        """
        sampling = {name: value for name, value in options.items() if name in prompts.SAMPLING_OPTIONS}
        switches = {name: value for name, value in options.items() if name not in sampling}
        prompt = render_chat(messages, tools, template=self._template, **switches)
        thinking = opens_thinking(prompt)
        tool_choice = tool_choice if tools else "none"  # without tools, their tags are text
        if stream:
            return self._stream_chat(prompt, params, OutputParser(tools, tool_choice, thinking), sampling)
        done = self.generate(prompt, params, **sampling)
        answers = [_answer(c, tools, tool_choice, thinking) for c in (done if isinstance(done, list) else [done])]
        return answers if isinstance(done, list) else answers[0]

    def logits(
        self,
        tokens: Prompt | Sequence[Prompt] | np.ndarray,
        *,
        trace: Sequence[str] = (),
        edit: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    ) -> Any:
        """Teacher-forced logits of every token.

        Args:
            tokens: text, token ids ``[T]``, or a batch of them.
            trace: activations to return, by name (:func:`glm_jax.model.activation_names`).
            edit: functions that replace activations by name; pass the same function object again to reuse the compilation.

        Returns:
            float32 ``[T, V]``; for a batch ``[B, T, V]``, or a list of ``[T, V]`` when the lengths differ. With ``trace``
            or ``edit`` a pair: the logits, and a dictionary of activations.
        """
        many, ids = self._ids(tokens, room=0)
        if not (trace or edit):
            return _together(self._runner().all_logits(ids), many)
        batch = prompts.rectangle(ids)
        runner = self._runner()
        with runner.placed():
            logits, recorded = steps.traced_logits(
                self.model, self.params, batch, tuple(trace), tuple(sorted((edit or {}).items()))
            )
        host = {name: np.asarray(value) for name, value in recorded.items()}
        if many:
            return np.asarray(logits), host
        return np.asarray(logits[0]), {name: value[0] for name, value in host.items()}

    def mtp_logits(self, tokens: Prompt | Sequence[Prompt] | np.ndarray) -> Any:
        """Logits of the prediction layer, shaped like those of :meth:`logits`.

        Entry ``p`` pairs the model's state at position ``p`` with token ``p + 1`` (the last with the model's argmax) and
        predicts token ``p + 2``.
        """
        many, ids = self._ids(tokens, room=0)
        runner = self._runner()
        with runner.placed():
            out = [np.asarray(steps.mtp_logits(self.model, self.params, np.asarray([row], np.int32))[0]) for row in ids]
        return _together(out, many)

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """Log-probability of a continuation after a prompt, in the model's own distribution."""
        _, (before, after) = self._ids([prompt, continuation], room=0)
        logits = self._runner().all_logits([[*before, *after]])[0][len(before) - 1 : -1]
        top = logits.max(axis=-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        each = logprobs[np.arange(len(after)), list(after)]
        return Score(float(each.sum()), tuple(each.tolist()), tuple(after))

    def save(self, path: str | Path, *, to: str = "orbax", force: bool = False) -> None:
        """Writes the model as a converted folder, or with ``to="safetensors"`` as a Hugging Face folder."""
        if to not in ("orbax", "safetensors"):
            raise GlmError(f'to must be "orbax" or "safetensors", not {to!r}')
        checkpoint.save(path, self.config, self.params, origin=self._info, to=to, force=force)  # type: ignore[arg-type]

    def release(self) -> None:
        """Frees the parameters' memory at once; the object cannot be used afterwards."""
        for leaf in jax.tree.leaves(self._params):
            leaf.delete()
        self._params = None

    def _runner(self) -> Runner:
        return Runner(
            model=self.model,
            params=self.params,
            mesh=self.mesh,
            cache_dtype=self._cache_dtype,
            valid_vocab=prompts.valid_vocab(self.tokenizer),
            max_len=self.max_model_len,
        )

    def _ids(self, given: Any, room: int = 1) -> tuple[bool, list[tuple[int, ...]]]:
        return prompts.encode(given, self.tokenizer, self.config.vocab_size, self.max_model_len - room)

    def _params_of(self, params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        if params is not None and not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling options must be SamplingParams or keywords, not {type(params).__name__}")
        chosen = (params or self.defaults).replace(**options) if options else (params or self.defaults)
        return chosen if chosen.seed is not None else chosen.replace(seed=self._random.randrange(2**53))

    def _rows(self, prompt: tuple[int, ...], params: SamplingParams, order: int) -> list[Row]:
        # Prompts of one call differ in their seeds too, unless the caller fixed one.
        return [
            Row(
                tokenizer=self.tokenizer,
                prompt_ids=prompt,
                params=params,
                seed=seed,
                budget=min(params.max_tokens, self.max_model_len - len(prompt)),
                stop_ids=frozenset((() if params.ignore_eos else self.config.eos_token_ids) + params.stop_token_ids),
                index=index,
                order=order,
            )
            for index, seed in enumerate(completion_seeds(params))
        ]

    def _finish(self, rows: Sequence[Row]) -> None:
        self.timing = Timing()
        runner = self._runner()
        for batch in prompts.batches(rows, _MAX_ROWS):
            for _ in runner.run(batch, self.timing):
                pass

    def _stream_chat(
        self, prompt: str, params: SamplingParams | None, parser: OutputParser, options: Mapping[str, Any]
    ) -> Iterator[Delta]:
        if self._params_of(params, options).n > 1:
            raise SamplingError("a streamed chat has one answer: n must be 1")
        for piece in self.stream(prompt, params, **options):
            yield from parser.feed(piece.text)
        yield from parser.flush()


def _answer(done: Completion, tools: Any, tool_choice: Any, thinking: bool) -> ChatCompletion:
    reason = done.finish_reason if done.finish_reason in ("length", "abort") else "stop"
    message = parse_output(done.text, tools=tools, tool_choice=tool_choice, thinking=thinking, finish_reason=reason)
    return ChatCompletion(
        text=done.text,
        token_ids=done.token_ids,
        finish_reason=message.finish_reason,
        seed=done.seed,
        prompt_tokens=done.prompt_tokens,
        logprobs=done.logprobs,
        message=message,
    )


def _context_limit(cfg: Config, asked: int | str) -> int:
    if asked == "auto":
        return cfg.max_position_embeddings
    if not isinstance(asked, int) or not 1 < asked <= cfg.max_position_embeddings:
        raise GlmError(f'max_model_len must be "auto" or 2 to {cfg.max_position_embeddings:,}, not {asked!r}')
    return asked


def _together(rows: list[np.ndarray], many: bool) -> Any:
    if not many:
        return rows[0]
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def _generation_defaults(folder: Path | None) -> SamplingParams:
    path = None if folder is None else folder / "generation_config.json"
    if path is None or not path.is_file():
        return SamplingParams()
    try:
        return SamplingParams.from_generation_config(json.loads(path.read_bytes()))
    except (ValueError, AttributeError) as error:
        if isinstance(error, SamplingError):
            raise
        raise GlmError(f"{path} is not valid JSON: {error}") from None
