"""The notebook object: load a model, generate, chat, stream, look inside."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from glm_jax import checkpoint
from glm_jax.cache.latent import canonical_cache_dtype
from glm_jax.checkpoint import OutputFormat, SourceInfo
from glm_jax.config import Config
from glm_jax.engine import scoring
from glm_jax.engine.assets import ModelAssets
from glm_jax.engine.chat import ChatResponseFormat, ChatStream, Messages, ToolChoice, Tools, render_chat_prompt
from glm_jax.engine.input_processor import (
    SAMPLING_PARAM_NAMES,
    InputProcessor,
    Prompt,
    SinglePrompt,
    TokenArray,
    TokenIds,
)
from glm_jax.engine.metrics import Timing
from glm_jax.engine.model_loader import load_model
from glm_jax.engine.outputs import ChatCompletion, Completion, Score, StreamChunk
from glm_jax.engine.runner import ModelRunner, default_cache_dtype
from glm_jax.errors import GlmError, PromptError, SamplingError
from glm_jax.memory import MemoryModel
from glm_jax.model.glm import GLM
from glm_jax.model.hooks import EditFn
from glm_jax.sampling import SamplingParams
from glm_jax.sharding import Rules
from glm_jax.text.tokenizer import valid_vocab_size
from glm_jax.weights import QuantRules
from glm_jax.weights.params import ParamTree


class LLM:
    """A loaded model; make one with :meth:`load`.

    Attributes:
        model: Flax module; ``model.apply({"params": llm.params}, ...)`` is a pure function.
        params: Parameters, nested dictionaries of arrays.
        config: Architecture of the model.
        mesh: Devices of the parameters, or None for one device.
        tokenizer: Tokenizer of the checkpoint.
        defaults: Sampling options of calls that give none, from the checkpoint's generation_config.json.
        eos_ids: Token ids that end a completion.
        max_model_len: Longest prompt and completion together, in tokens.
        timing: Token counts and seconds of the last call.
    """

    def __init__(
        self,
        cfg: Config,
        params: ParamTree,
        assets: ModelAssets,
        *,
        info: SourceInfo | None = None,
        rules: Rules = Rules(),
        mesh: Mesh | None = None,
        cache_dtype: DTypeLike | None = None,
        max_model_len: int | None = None,
        seed: int | None = None,
        memory_model: MemoryModel | None = None,
    ) -> None:
        self.config, self.mesh = cfg, mesh
        self.model = GLM(cfg, rules)
        self.tokenizer, self.defaults, self.eos_ids = assets.tokenizer, assets.default_sampling_params, assets.eos_ids
        self.max_model_len = min(max_model_len or cfg.max_position_embeddings, cfg.max_position_embeddings)
        self.timing = Timing()
        self._params: ParamTree | None = params
        self._cache_dtype = canonical_cache_dtype(cache_dtype or default_cache_dtype(mesh, params["embed"].dtype))
        self._chat_template, self._source_info, self._memory_model = assets.chat_template, info, memory_model
        seed_rng = random.SystemRandom() if seed is None else random.Random(seed)
        self._input_processor = InputProcessor(
            assets=assets, vocab_size=cfg.vocab_size, max_model_len=self.max_model_len, seed_rng=seed_rng
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
                "int8", or :class:`~glm_jax.weights.QuantRules`: quantizes while loading, with the least squared error
                (for learned rounding: ``python -m convert SRC DST --quantize int4 --method signround``). By default
                every weight keeps the values of the source, and a quantized weight stays quantized.
            dtype: Dtype of activations and of weights that are not quantized, "bfloat16" or "float32".
            cache_dtype: Dtype of the latent cache, "bfloat16", "float32", "int8" or "fp8"; by default ``dtype``, and
                float32 on a CPU. The 8-bit caches take half the bytes of bfloat16, and round the latents.
            mesh: Number of devices, or a mesh with axes ("data", "model"); by default one device.
            sharding: Layout on the mesh: "latency" (the default) splits heads and widths, "replicated" nothing.
            max_model_len: Longest prompt and completion together, in tokens; "auto" is what model and memory allow.
            latent_eps: Epsilon of the norms inside attention: 1e-6 as in transformers, 1e-5 as in serving engines.
            kernels: "triton" (hand-written kernels, for NVIDIA GPUs) or "reference" (plain JAX for any device, with
                derivatives); by default the kernels in bfloat16 on a GPU with Triton, else the reference.
            seed: Makes the random seeds of requests without a seed repeatable.
            check: Also looks for NaN and infinite weights, and verifies hashes.
            progress: Shows a progress bar on stderr; by default for weights over 1 GB.

        Raises:
            CheckpointError, ConfigError, ShardingError: if the source or the mesh cannot be used.
            MemoryPlanError: if the model does not fit into memory; the message has the arithmetic.
        """
        loaded = load_model(
            source,
            quantize=quantize,
            dtype=dtype,
            cache_dtype=cache_dtype,
            mesh=mesh,
            sharding=sharding,
            max_model_len=max_model_len,
            kernels=kernels,
            check=check,
            progress=progress,
        )
        return cls(
            loaded.cfg if latent_eps is None else loaded.cfg.replace(latent_eps=latent_eps),
            loaded.params,
            loaded.assets,
            info=loaded.info,
            rules=loaded.rules,
            mesh=loaded.mesh,
            cache_dtype=loaded.cache_dtype,
            max_model_len=loaded.max_model_len,
            seed=seed,
            memory_model=loaded.memory_model,
        )

    @property
    def params(self) -> ParamTree:
        """Parameters, nested dictionaries of arrays.

        ``jax.grad`` takes no integers: to differentiate, load with ``dtype="float32"`` on a CPU, which holds bfloat16
        matrices as 16-bit integers, and with ``kernels="reference"`` on a GPU, whose kernels read 32-bit words.
        """
        if self._params is None:
            raise GlmError("this model was released; load it again")
        return self._params

    @params.setter
    def params(self, params: ParamTree) -> None:
        """Replaces the parameters, with fine-tuned ones for example."""
        self._params = params

    # Overloads list the arguments that decide the type. `n` may be in `params`, so with these the type is a union.
    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  (text is a sequence of text too)
        self, prompts: SinglePrompt, params: None = None, *, n: Literal[1] = 1, **options: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: None = None, *, n: Literal[1] = 1, **options: Any
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompts: SinglePrompt, params: SamplingParams | None = None, **options: Any
    ) -> Completion | list[Completion]: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> list[Completion] | list[list[Completion]]: ...
    @overload
    def generate(
        self, prompts: TokenArray, params: SamplingParams | None = None, **options: Any
    ) -> Completion | list[Completion] | list[list[Completion]]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """Completes one prompt or several.

        Args:
            prompts: Text or token ids, or a list of these.
            params: Sampling options; the checkpoint's defaults if omitted.
            options: Single sampling options, which override ``params``.

        Returns:
            A :class:`~glm_jax.engine.outputs.Completion` for one prompt, a list for a list; with ``n > 1`` a list of
            ``n`` in place of each. Without a seed each prompt gets a random one; a given seed applies to every prompt.

        Raises:
            PromptError: if a prompt is empty or longer than the context.
            SamplingError: if an option is unknown or has an impossible value.
        """
        is_batch, prompt_ids = self._input_processor.tokenize(prompts)
        sampling_params = self._input_processor.resolve_sampling_params(params, options)
        completions = self._complete(prompt_ids, sampling_params)
        if sampling_params.n > 1:
            return completions if is_batch else completions[0]
        return [first for first, *_ in completions] if is_batch else completions[0][0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[StreamChunk]:
        """Completes one prompt and yields its text as it is generated.

        Leaving the loop, or Ctrl-C, ends the completion and leaves the model usable. With ``n > 1`` the chunks of all
        completions are mixed; their ``index`` tells them apart. Arguments and errors are those of :meth:`generate`.
        """
        is_batch, prompt_ids = self._input_processor.tokenize(prompt)
        if is_batch:
            raise PromptError("a stream has one prompt; generate takes a list")
        sampling_params = self._input_processor.resolve_sampling_params(params, options)
        requests = self._input_processor.make_requests(prompt_ids[0], sampling_params)
        self.timing = Timing()
        return (chunk for _, chunk in self._make_runner().run_all(requests, self.timing, stream=True))

    @overload
    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, stream: Literal[True], **options: Any
    ) -> ChatStream: ...
    @overload
    def chat(
        self,
        messages: Messages,
        params: None = None,
        *,
        stream: Literal[False] = False,
        n: Literal[1] = 1,
        **options: Any,
    ) -> ChatCompletion: ...
    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> ChatCompletion | list[ChatCompletion]: ...
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        stream: bool = False,
        **options: Any,
    ) -> ChatStream | ChatCompletion | list[ChatCompletion]:
        """Answers a conversation.

        Args:
            messages: Conversation in OpenAI's form.
            params: Sampling options; the checkpoint's defaults if omitted.
            tools: Functions that the model may call, in OpenAI's form.
            tool_choice: "auto"; "none" drops all calls; a function's object drops calls of other functions. Nothing
                forces the model to call.
            stream: Returns the answer as a stream of :class:`~glm_jax.text.Delta`.
            options: Single sampling options, and switches of the chat template such as ``enable_thinking=False``.

        Returns:
            A :class:`~glm_jax.engine.outputs.ChatCompletion`, or a list of ``n`` with ``n > 1``. With ``stream`` an
            iterator of deltas, whose attribute ``completion`` is the whole answer once it has ended.

        Raises:
            PromptError: if the conversation, a tool or a switch is malformed, or the prompt is too long.
            SamplingError: if an option has an impossible value.
        """
        sampling_options = {name: options.pop(name) for name in list(options) if name in SAMPLING_PARAM_NAMES}
        prompt = render_chat_prompt(messages, tools, self._chat_template, options)
        response_format = ChatResponseFormat.from_prompt(prompt, tools, tool_choice)
        sampling_params = self._input_processor.resolve_sampling_params(params, sampling_options)
        if stream:
            if sampling_params.n > 1:
                raise SamplingError("a streamed chat has one answer: n must be 1")
            return ChatStream(self.stream(prompt, sampling_params), response_format.make_parser())
        (completions,) = self._complete(self._input_processor.tokenize(prompt)[1], sampling_params)
        answers = [response_format.to_chat_completion(completion) for completion in completions]
        return answers if sampling_params.n > 1 else answers[0]

    @overload
    def logits(  # pyright: ignore[reportOverlappingOverload]  (calls without trace and edit match the first two)
        self, tokens: SinglePrompt | TokenArray
    ) -> np.ndarray: ...
    @overload
    def logits(self, tokens: Sequence[Prompt]) -> np.ndarray | list[np.ndarray]: ...
    @overload
    def logits(
        self, tokens: Prompt | Sequence[Prompt], *, trace: Sequence[str] = (), edit: Mapping[str, EditFn] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]: ...
    def logits(
        self,
        tokens: Prompt | Sequence[Prompt],
        *,
        trace: Sequence[str] = (),
        edit: Mapping[str, EditFn] | None = None,
    ) -> np.ndarray | list[np.ndarray] | tuple[np.ndarray, dict[str, np.ndarray]]:
        """Teacher-forced logits of every token.

        Args:
            tokens: Text, token ids ``[T]``, or a batch of these.
            trace: Names of activations to return (:func:`glm_jax.model.activation_names`).
            edit: Functions that replace activations, by name; a new function object compiles again, as does a length.

        Returns:
            ``float32 [T, V]``; for a batch ``float32 [B, T, V]``, or a list of ``float32 [T, V]`` when the lengths
            differ. With a name in ``trace`` or ``edit`` a pair: the logits, and a dictionary of the traced activations.

        Raises:
            PromptError: if a prompt is empty or longer than the context, or traced prompts differ in length.
            ConfigError: if the model has no activation of a name.
        """
        is_batch, prompt_ids = self._input_processor.tokenize(tokens, reserved_tokens=0)
        if trace or edit:
            logits, activations = scoring.trace_prompts(self._make_runner(), prompt_ids, trace, edit or {})
            if is_batch:
                return logits, activations
            return logits[0], {name: value[0] for name, value in activations.items()}
        per_prompt = scoring.prompt_logits(self._make_runner(), prompt_ids)
        return scoring.stack_logits(per_prompt) if is_batch else per_prompt[0]

    @overload
    def mtp_logits(self, tokens: SinglePrompt | TokenArray) -> np.ndarray: ...
    @overload
    def mtp_logits(self, tokens: Sequence[Prompt]) -> np.ndarray | list[np.ndarray]: ...
    def mtp_logits(self, tokens: Prompt | Sequence[Prompt]) -> np.ndarray | list[np.ndarray]:
        """Logits of the prediction layer (multi-token prediction), with the shapes of :meth:`logits`.

        Entry ``p`` predicts token ``p + 2`` from the hidden state at position ``p`` and token ``p + 1``; the last entry
        takes the argmax of the model's logits as its next token.

        Raises:
            PromptError, ConfigError: as :meth:`logits`, and if the model has no prediction layer.
        """
        is_batch, prompt_ids = self._input_processor.tokenize(tokens, reserved_tokens=0)
        per_prompt = [scoring.mtp_logits(self._make_runner(), prompt) for prompt in prompt_ids]
        return scoring.stack_logits(per_prompt) if is_batch else per_prompt[0]

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """Log-probability of a continuation after a prompt, in the model's own distribution.

        Prompt and continuation are tokenized apart, and their tokens concatenated.

        Raises:
            PromptError: if either is empty, or both together are longer than the context.
        """
        prompt_ids, continuation_ids = self._input_processor.tokenize_pair(prompt, continuation)
        return scoring.score_continuation(self._make_runner(), prompt_ids, continuation_ids)

    def save(self, path: str | Path, *, to: OutputFormat = "orbax", force: bool = False) -> None:
        """Writes the model as a converted folder, or with ``to="safetensors"`` as a Hugging Face folder.

        Raises:
            CheckpointError: if the folder cannot be written, or is not empty; ``force`` replaces a conversion in it.
        """
        if to not in ("orbax", "safetensors"):
            raise GlmError(f'to must be "orbax" or "safetensors", not {to!r}')
        checkpoint.save(path, self.config, self.params, origin=self._source_info, to=to, force=force)

    def release(self) -> None:
        """Frees the memory of the parameters at once; the model cannot be used afterwards."""
        for leaf in jax.tree.leaves(self._params):
            leaf.delete()
        self._params = None

    def _complete(self, prompts: Sequence[TokenIds], params: SamplingParams) -> list[list[Completion]]:
        """The ``n`` completions of each prompt."""
        make_requests = self._input_processor.make_requests
        per_prompt = [make_requests(prompt, params, index) for index, prompt in enumerate(prompts)]
        self.timing = Timing()
        for _ in self._make_runner().run_all([request for group in per_prompt for request in group], self.timing):
            pass
        return [[request.to_completion() for request in group] for group in per_prompt]

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
