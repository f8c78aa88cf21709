"""Open answers of any data: VQA accuracy where people's answers are known, exact match with the right one where they are not."""

from collections.abc import Sequence

from probe.example import Example
from studies.tasks.readers import human_answers
from studies.tasks.scores import Score, average, exactly
from studies.tasks.scores_text import exact_match, vqa_item
