"""How good an output's answers are, over all and by group, from the scores that stand in it."""

from batcher.results.measure import Label, Measured, Scores, measure
from batcher.results.render import as_csv, as_json, as_markdown, as_text

__all__ = ["Label", "Measured", "Scores", "as_csv", "as_json", "as_markdown", "as_text", "measure"]
