"""An answer's text -> a value that fits what the job asks for, and the Arrow type that holds it."""

from batcher.parse.labels import Choices, Pattern, extract
from batcher.parse.parser import Parser
from batcher.parse.schema import AnswerSchema, format_schema

__all__ = ["AnswerSchema", "Choices", "Parser", "Pattern", "extract", "format_schema"]
