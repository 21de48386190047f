"""The kinds of task that a source of training data can be of, without what reads the data: commands name them in their help."""

from typing import Literal

TaskKind = Literal["retrieval", "clustering", "classification", "graded"]  # the last: pairs of texts with a score of their likeness
