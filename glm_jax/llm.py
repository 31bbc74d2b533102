"""The notebook object: load a model, generate, chat, stream, look inside."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from glm_jax import checkpoint
from glm_jax.cache.latent import canonical_cache_dtype
from glm_jax.checkpoint.loader import OutputFormat, SourceInfo
from glm_jax.config import Config
from glm_jax.engine import scoring, steps
from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.chat import ChatResponseFormat, ChatStream
from glm_jax.engine.compile_cache import enable_compile_cache
from glm_jax.engine.input_processor import SAMPLING_PARAM_NAMES, InputProcessor, Prompt
from glm_jax.engine.metrics import Timing
from glm_jax.engine.outputs import Completion, Score, StreamChunk
from glm_jax.engine.request import Request
from glm_jax.engine.runner import ModelRunner, default_cache_dtype
from glm_jax.engine.scheduler import make_batches
from glm_jax.errors import GlmError, PromptError, SamplingError, ShardingError
from glm_jax.memory import MemoryModel, format_bytes, plan_memory_on_devices
from glm_jax.model.glm import GLM
from glm_jax.model.kernel_selection import prefer_kernels, select_kernels
from glm_jax.sampling import SamplingParams
from glm_jax.sharding import Rules, get_sharding_preset, make_mesh
from glm_jax.text import render_chat
from glm_jax.text.tokenizer import valid_vocab_size
from glm_jax.weights import QuantRules

_MAX_BATCH_SIZE = 64
_DTYPES = ("bfloat16", "float32")


class LLM:
    """A loaded model; make one with :meth:`load`.

    Attributes:
        model: the Flax module; ``model.apply({"params": llm.params}, ...)`` is a pure function.
        params: nested dictionary of arrays.
        config: the architecture.
        mesh: the devices, or None for one.
        tokenizer: text to ids and back.
        defaults: sampling options used where a call gives none (from the checkpoint's generation_config.json).
        eos_ids: tokens that end a completion.
        max_model_len: longest prompt and completion together.
        timing: of the last call.
    """

    def __init__(
        self,
        cfg: Config,
        params: steps.Params,
        assets: ModelAssets,
        *,
        info: SourceInfo | None = None,
        rules: Rules = Rules(),
        mesh: Mesh | None = None,
        cache_dtype: Any = None,
        max_model_len: int | None = None,
        seed: int | None = None,
        memory_model: MemoryModel | None = None,
    ) -> None:
        self.config, self.mesh = cfg, mesh
        self.model = GLM(cfg, rules)
        self.tokenizer, self.defaults, self.eos_ids = assets.tokenizer, assets.default_sampling_params, assets.eos_ids
        self.max_model_len = min(max_model_len or cfg.max_position_embeddings, cfg.max_position_embeddings)
        self.timing = Timing()
        self._params: steps.Params | None = params
        self._cache_dtype = canonical_cache_dtype(cache_dtype or default_cache_dtype(mesh, params["embed"].dtype))
        self._chat_template, self._source_info, self._memory_model = assets.chat_template, info, memory_model
        seeds = random.SystemRandom() if seed is None else random.Random(seed)
        self._input_processor = InputProcessor(
            assets=assets, vocab_size=cfg.vocab_size, max_model_len=self.max_model_len, seed_rng=seeds
        )

    @classmethod
    def load(
        cls,
        source: str | Path = "tiny",
        *,
        quantize: str | QuantRules | None = None,
        dtype: str = "bfloat16",
        cache_dtype: str | None = None,
        mesh: int | Mesh | None = None,
        sharding: str | None = None,
        max_model_len: int | str = "auto",
        latent_eps: float | None = None,
        kernels: str | None = None,
        seed: int | None = None,
        check: bool = False,
        progress: bool | None = None,
    ) -> Self:
        """Loads a model.

        Args:
            source: "tiny" (the built-in miniature), a Hugging Face folder or hub id, a converted folder, a GGUF file,
                or "synthetic:flash?layers=4&seed=0" (random weights, full width).
            quantize: "int4" (experts in 4 bits, the rest in 8), "int4-small" (everything in 4), "int4-experts",
                "int8", or :class:`~glm_jax.weights.QuantRules`: done while loading, by the least squared error. For
                learned rounding convert first: ``python -m convert SRC DST --quantize int4 --method signround``.
                Unless given, every weight keeps the values of the source, and a quantized one stays quantized.
            dtype: "bfloat16" or "float32", of activations and of weights that are not quantized.
            cache_dtype: "bfloat16", "float32", "int8" or "fp8", of the latent cache; unless given that of the
                activations, and float32 on a CPU. The last two take half of bfloat16's bytes, and round what is stored.
            mesh: number of devices, or a mesh with axes ("data", "model"); one device unless given.
            sharding: layout on the mesh, "latency" (the default: heads and widths split) or "replicated".
            max_model_len: longest prompt and completion together; "auto" is what the model and the memory allow.
            latent_eps: epsilon of the norms inside the attention: 1e-6 as in transformers unless given; serving engines
                have 1e-5.
            kernels: "triton" (hand-written kernels, for NVIDIA GPUs) or "reference" (plain JAX, which XLA compiles for
                any device, and which can be differentiated); the former unless given, in bfloat16 on a GPU with Triton.
            seed: makes the seeds drawn for requests without one repeatable.
            check: also look for NaN and infinite weights, and verify hashes.
            progress: show a progress bar on stderr; by default for weights over 1 GB.

        Raises:
            CheckpointError, ConfigError, ShardingError: what is wrong with the source or the mesh.
            MemoryPlanError: if it cannot fit, with the arithmetic.
        """
        enable_compile_cache()
        if dtype not in _DTYPES:
            raise GlmError(f"dtype must be {' or '.join(_DTYPES)}, not {dtype!r}")
        cache_dtype = None if cache_dtype is None else canonical_cache_dtype(cache_dtype)
        weights = checkpoint.open_source(source, dtype=dtype)
        asked = _parse_max_model_len(weights.cfg, max_model_len)
        companions = ModelAssets.load(weights.cfg, weights.info.folder)  # cheap, and may be what is missing
        rules, devices = _resolve_sharding(mesh, sharding)
        prefer_kernels(kernels, dtype)  # refuses what cannot be, before anything takes time
        weights = checkpoint.quantize_source(weights, quantize, dtype, rules, devices)
        storage = checkpoint.source_storage(weights)
        tiles = select_kernels(weights.cfg, storage, kernels, dtype, rules, devices)
        cache_dtype = cache_dtype or default_cache_dtype(devices, dtype)
        planned = plan_memory_on_devices(
            weights.cfg,
            devices or jax.devices()[:1],
            dtype=dtype,
            storage=storage,
            cache_dtype=cache_dtype,
            rules=rules,
            context=asked,
        ).require_fits()
        show = weights.total_bytes() > 1 << 30 if progress is None else progress
        for note in weights.info.notes:
            print(f"note: {note}; {format_bytes(weights.total_bytes())} of weights in all", file=sys.stderr)
        cfg, params, info = checkpoint.load(
            weights, dtype=dtype, rules=rules, mesh=devices, tiles=tiles, check=check, progress=show
        )
        return cls(
            cfg if latent_eps is None else cfg.replace(latent_eps=latent_eps),
            params,
            companions,
            info=info,
            rules=rules,
            mesh=devices,
            cache_dtype=cache_dtype,
            max_model_len=asked or planned.max_context,
            seed=seed,
            memory_model=planned.memory_model,
        )

    @property
    def params(self) -> steps.Params:
        """The parameters, a nested dictionary of arrays.

        To differentiate, load on a CPU with ``dtype="float32"`` (bfloat16 matrices are held as 16-bit integers there)
        and on a GPU with ``kernels="reference"`` (kernels read them as 32-bit words): ``jax.grad`` takes no integers.
        """
        if self._params is None:
            raise GlmError("this model was released; load it again")
        return self._params

    @params.setter
    def params(self, params: steps.Params) -> None:
        """Replaces the parameters, by fine-tuned ones for example."""
        self._params = params

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **options: Any) -> Any:
        """Completes one prompt or many.

        Args:
            prompts: text or token ids, or a list of these.
            params: sampling options; the checkpoint's defaults unless given.
            options: single sampling options, over ``params``.

        Returns:
            A :class:`~glm_jax.engine.outputs.Completion` for one prompt, a list for a list; with ``n > 1`` a list
            of ``n`` in place of each. Without a seed each prompt draws its own; a given seed holds for every prompt.

        Raises:
            PromptError: if a prompt is empty or longer than the context.
            SamplingError: if an option is impossible.
        """
        many, ids = self._input_processor.tokenize(prompts)
        chosen = self._input_processor.resolve_sampling_params(params, options)
        rows = [
            row
            for order, prompt in enumerate(ids)
            for row in self._input_processor.make_requests(prompt, chosen, order)
        ]
        self._run_to_completion(rows)
        results: list[list[Completion]] = [[] for _ in ids]
        for row in rows:
            results[row.prompt_index].append(row.to_completion())
        shaped = [r if chosen.n > 1 else r[0] for r in results]
        return shaped if many else shaped[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[StreamChunk]:
        """Completes one prompt piece by piece; leaving the loop, or Ctrl-C, ends it and leaves the model usable.

        Arguments as in :meth:`generate`. With ``n > 1`` the pieces of all completions come as they are written; their
        ``index`` tells them apart.
        """
        many, ids = self._input_processor.tokenize(prompt)
        if many:
            raise PromptError("a stream has one prompt; generate takes a list")
        rows = self._input_processor.make_requests(
            ids[0], self._input_processor.resolve_sampling_params(params, options)
        )
        self.timing = Timing()
        runner, timing = self._make_runner(), self.timing
        batches = make_batches(rows, _MAX_BATCH_SIZE, runner.fits)
        return (piece for batch in batches for _, piece in runner.run(batch, timing, stream=True))

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
            tool_choice: "auto"; "none" leaves calls out; a function's object leaves calls of any other out. Nothing
                forces the model to call.
            stream: yield :class:`~glm_jax.text.Delta` pieces instead of returning the whole.
            options: sampling options, and switches of the chat template such as ``enable_thinking=False``.

        Returns:
            A :class:`~glm_jax.engine.outputs.ChatCompletion` (a list of them with ``n > 1``), or an iterator of deltas,
            whose attribute ``completion`` is that of the whole answer at the end.

        Raises:
            PromptError: if the conversation, a tool or a switch is malformed, or the prompt too long.
            SamplingError: if an option is impossible.
        """
        sampling = {name: value for name, value in options.items() if name in SAMPLING_PARAM_NAMES}
        switches = {name: value for name, value in options.items() if name not in sampling}
        if reserved := sorted(switches.keys() & {"template", "add_generation_prompt"}):
            raise PromptError(f"{reserved[0]} is not a switch of the chat template: answers use the model's own")
        prompt = render_chat(messages, tools, template=self._chat_template, **switches)
        answer = ChatResponseFormat.from_prompt(prompt, tools, tool_choice)
        chosen = self._input_processor.resolve_sampling_params(params, sampling)
        if stream:
            if chosen.n > 1:
                raise SamplingError("a streamed chat has one answer: n must be 1")
            return ChatStream(self.stream(prompt, chosen), answer.make_parser())
        done = self.generate(prompt, chosen)
        return [answer.to_chat_completion(each) for each in done] if chosen.n > 1 else answer.to_chat_completion(done)

    def logits(
        self,
        tokens: Prompt | Sequence[Prompt],
        *,
        trace: Sequence[str] = (),
        edit: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    ) -> Any:
        """Teacher-forced logits of every token.

        Args:
            tokens: text, token ids ``[T]``, or a batch of them.
            trace: activations to return, by name (:func:`glm_jax.model.activation_names`).
            edit: functions that replace activations by name; pass the same function object again to reuse the
                compilation, of which each length needs one.

        Returns:
            float32 ``[T, V]``; for a batch ``[B, T, V]``, or a list of ``[T, V]`` when the lengths differ. With
            ``trace`` or ``edit`` a pair: the logits, and a dictionary of activations.
        """
        many, ids = self._input_processor.tokenize(tokens, reserved_tokens=0)
        if not (trace or edit):
            return _stack_equal_shapes(scoring.prompt_logits(self._make_runner(), ids), many)
        batch, changes = scoring.stack_token_ids(ids), tuple(sorted((edit or {}).items()))
        with self._make_runner().mesh_context():
            logits, recorded = scoring.traced_logits(self.model, self.params, batch, tuple(trace), changes)
        host = {name: np.asarray(value) for name, value in recorded.items()}
        if many:
            return np.asarray(logits), host
        return np.asarray(logits)[0], {name: value[0] for name, value in host.items()}

    def mtp_logits(self, tokens: Prompt | Sequence[Prompt]) -> Any:
        """Logits of the prediction layer, shaped like those of :meth:`compute_logits`.

        Entry ``p`` pairs the model's state at position ``p`` with token ``p + 1`` (the last with the model's argmax)
        and predicts token ``p + 2``.
        """
        many, ids = self._input_processor.tokenize(tokens, reserved_tokens=0)
        return _stack_equal_shapes([scoring.mtp_logits(self._make_runner(), row) for row in ids], many)

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """Log-probability of a continuation after a prompt, in the model's own distribution.

        The two are encoded apart, and their tokens joined.
        """
        (before,), (after,) = (
            self._input_processor.tokenize(prompt, reserved_tokens=1)[1],
            self._input_processor.tokenize(continuation, reserved_tokens=1)[1],
        )
        _, (joined,) = self._input_processor.tokenize([*before, *after], reserved_tokens=0)
        logits = scoring.prompt_logits(self._make_runner(), [joined], start_position=len(before) - 1)[0][:-1]
        top = logits.max(axis=-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        each = logprobs[np.arange(len(after)), list(after)]
        return Score(float(each.sum()), tuple(each.tolist()), tuple(after))

    def save(self, path: str | Path, *, to: OutputFormat = "orbax", force: bool = False) -> None:
        """Writes the model as a converted folder, or with ``to="safetensors"`` as a Hugging Face folder.

        Raises:
            CheckpointError: if the folder cannot be written, or holds something else already.
        """
        if to not in ("orbax", "safetensors"):
            raise GlmError(f'to must be "orbax" or "safetensors", not {to!r}')
        checkpoint.save(path, self.config, self.params, origin=self._source_info, to=to, force=force)

    def release(self) -> None:
        """Frees the parameters' memory at once; the object cannot be used afterwards."""
        for leaf in jax.tree.leaves(self._params):
            leaf.delete()
        self._params = None

    def _make_runner(self) -> ModelRunner:
        return ModelRunner(
            model=self.model,
            params=self.params,
            mesh=self.mesh,
            cache_dtype=self._cache_dtype,
            valid_vocab_size=valid_vocab_size(self.tokenizer),
            unused_ids=self.tokenizer.unused_ids,
            eos_ids=self.eos_ids,
            max_model_len=self.max_model_len,
            memory_model=self._memory_model,
        )

    def _run_to_completion(self, requests: Sequence[Request]) -> None:
        self.timing = Timing()
        runner = self._make_runner()
        for batch in make_batches(requests, _MAX_BATCH_SIZE, runner.fits):
            for _ in runner.run(batch, self.timing):
                pass


def _resolve_sharding(mesh: int | Mesh | None, sharding: str | None) -> tuple[Rules, Mesh | None]:
    devices = None if mesh is None else make_mesh(mesh)
    rules = get_sharding_preset(sharding or ("replicated" if mesh in (None, 1) else "latency"))
    if devices is None and rules.mesh_axes:
        raise ShardingError(f"sharding={sharding!r} needs devices to split over: give mesh=, the number of them")
    return rules, devices


def _parse_max_model_len(cfg: Config, max_model_len: int | str) -> int | None:
    if max_model_len == "auto":
        return None
    if not isinstance(max_model_len, int) or not 1 < max_model_len <= cfg.max_position_embeddings:
        raise GlmError(f'max_model_len must be "auto" or 2 to {cfg.max_position_embeddings:,}, not {max_model_len!r}')
    return max_model_len


def _stack_equal_shapes(rows: list[np.ndarray], many: bool) -> Any:
    if not many:
        return rows[0]
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else rows
