"""Text to token ids and back, conversations to prompts, and answers to messages. Imports no JAX."""

from glm_jax.text.chat_template import is_official, read_template, render_chat
from glm_jax.text.output_parser import OutputParser, opens_thinking, parse_output
from glm_jax.text.output_types import Delta, Message, ToolCall, ToolCallDelta
from glm_jax.text.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Delta",
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
