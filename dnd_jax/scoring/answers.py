"""The scores of an answer: exact match, right content, right format.

`dnd lm-eval` copies this file beside the tasks that it writes, whose answers the harness compares
by it: it needs nothing but Python.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

# How answers are asked for, ended and compared: scores by another rule are made anew. 0.2.0 had 1,
# and did not record it.
RULE = 2
SCORES = ("exact", "content", "format")
# a word that this share of a dataset's responses has belongs to the form, the others to the content
FORM_SHARE = 0.95


def words(text: str) -> list[str]:
    """Words and single punctuation marks of a text: what is compared of two answers. Spaces do not
    count, nor how Unicode composes a letter, which many tokenizers change."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", text))


def harness_result(row: Mapping, results: Sequence) -> dict[str, float]:
    """What the harness asks of a question of the suite's own tasks: whether its answer is right.

    results: the generated text; or (log-likelihood, ...) of each of row["labels"].
    """
    if "labels" not in row:
        return {"exact_match": float(words(results[0]) == words(row["answer"]))}
    likeliest = max(range(len(results)), key=lambda i: results[i][0])
    return {"acc": float(words(row["labels"][likeliest]) == words(row["answer"]))}


class Scorer:
    """Scores answers to one dataset's questions.

    exact: the same words in the same order. content: the share of the right answer's content words
    that the answer holds (words that nearly all of the dataset's responses share are form, the
    others content). format: the answer has the right shape: as many words, the same form words and
    punctuation in the same places, any word where a content word belongs.
    """

    def __init__(self, responses: Sequence[str]):
        self.right = [words(r) for r in responses]
        counts: dict[str, int] = {}
        for response in self.right:
            for word in set(response):
                counts[word] = counts.get(word, 0) + 1
        self.form = {
            word for word, count in counts.items() if count >= FORM_SHARE * len(self.right)
        }

    def _shape(self, answer: Iterable[str]) -> list[str]:
        return [w if w in self.form or not w[0].isalnum() else "*" for w in answer]

    def each(self, answers: Sequence[str]) -> dict[str, list[float]]:
        """Scores, each in 0..1, of one answer a question in the order of the responses."""
        scores: dict[str, list[float]] = {key: [] for key in SCORES}
        for right, text in zip(self.right, answers, strict=True):
            answer = words(text)
            content = set(right) - self.form
            scores["exact"].append(float(answer == right))
            scores["content"].append(
                len(content & set(answer)) / len(content) if content else float(answer == right)
            )
            scores["format"].append(float(self._shape(answer) == self._shape(right)))
        return scores

    def __call__(self, answers: Sequence[str]) -> dict[str, float]:
        """The means of `each`."""
        return {key: sum(values) / len(values) for key, values in self.each(answers).items()}
