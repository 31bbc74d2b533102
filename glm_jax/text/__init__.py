"""Text: tokenizer, chat template, and the parser that splits an answer into reasoning, content and tool calls.

========================  ========================================================================================
``tokenizer``             ``Tokenizer``, ``StreamDecoder``; ``token_bytes`` holds the bytes of single tokens
``chat_template``         ``render_chat``: messages to prompt; ``sandbox`` renders templates of other checkpoints
``messages``, ``tools``   checks of a request's messages and tools
``output_parser``         ``OutputParser``, ``parse_output``; ``output_builders`` and ``schema_coercion`` serve it
``output_types``          ``Message``, ``ToolCall``, ``Delta``, ``FinishReason``
========================  ========================================================================================

Imports no JAX.
"""

from glm_jax.text.chat_template import is_official, read_template, render_chat
from glm_jax.text.output_parser import OutputParser, opens_thinking, parse_output
from glm_jax.text.output_types import Delta, FinishReason, Message, ToolCall, ToolCallDelta
from glm_jax.text.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Delta",
    "FinishReason",
    "Message",
    "OutputParser",
    "StreamDecoder",
    "Tokenizer",
    "ToolCall",
    "ToolCallDelta",
    "is_official",
    "opens_thinking",
    "parse_output",
    "read_template",
    "render_chat",
]
