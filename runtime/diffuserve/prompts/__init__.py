"""Prompts as text encoders read them: syntax, windows of tokens, textual inversion."""

from diffuserve.prompts.embeddings import EmbeddingFolder
from diffuserve.prompts.reading import PromptReader, Reading, Text
from diffuserve.prompts.windows import PromptTokenizer, Window

__all__ = ["EmbeddingFolder", "PromptReader", "PromptTokenizer", "Reading", "Text", "Window"]
