"""BLEU-4, ROUGE-L and METEOR of answers against reference sentences, by maintained libraries. Imported only if needed.

They compare whole sentences, not labels: "The lesion is on the left." against "… on the right." scores high.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgvqa.errors import UsageError
from surgvqa.machine.packages import require_installed

PACKAGES = ("sacrebleu", "rouge_score", "nltk")
EXTRA = "text-scores"


class _NoSynonyms:
    """Replaces WordNet, which would have to be downloaded. METEOR then matches only words and their stems."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


def text_scores(answers: Sequence[str], references: Sequence[str | None]) -> dict[str, float]:
    """Scores, 0..1, over the answers with a reference sentence; `samples` is the number of these.

    - `bleu_4`: corpus BLEU by sacreBLEU: geometric mean of the clipped 1- to 4-gram precisions, times the brevity
      penalty; tokenised by "13a", with case, no smoothing.
    - `precision_4gram`: clipped 4-gram precision of the whole file, without brevity penalty: the "BLEU-4" of the
      dataset's paper.
    - `rouge_l`: mean of each pair's F1 of the longest common subsequence (rouge-score), lower case, no stemming.
    - `meteor`: mean of each pair's METEOR (nltk; α 0.9, β 3, γ 0.5), in lower case, exact words and Porter stems; no
      synonyms, so that it is lower than with WordNet.

    Raises UsageError without any reference sentence, SurgvqaError if the libraries are missing.
    """
    require_installed("--text_scores", PACKAGES, EXTRA)
    pairs = [(answer, reference) for answer, reference in zip(answers, references) if reference and reference.strip()]
    if not pairs:
        raise UsageError("text_scores: no prediction has a ground_truth, the reference sentence to compare with")
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    bleu = BLEU(smooth_method="none").corpus_score([a for a, _ in pairs], [[r for _, r in pairs]])
    rouge, words = RougeScorer(["rougeL"]), Tokenizer13a()
    meteor = [
        single_meteor_score(words(r.lower()).split(), words(a.lower()).split(), wordnet=_NoSynonyms) for a, r in pairs
    ]
    return {
        "samples": len(pairs),
        "bleu_4": min(1.0, bleu.score / 100),
        "precision_4gram": bleu.precisions[3] / 100,
        "brevity_penalty": bleu.bp,
        "rouge_l": sum(rouge.score(r, a)["rougeL"].fmeasure for a, r in pairs) / len(pairs),
        "meteor": sum(meteor) / len(pairs),
    }
