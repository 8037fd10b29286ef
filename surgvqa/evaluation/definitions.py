"""The definition of each score, for the report. docs/scores.md has the same text, which a test checks."""

from __future__ import annotations

from typing import NamedTuple


class Definition(NamedTuple):
    """The definition of one score."""

    name: str
    what: str
    source: str
    misleads: str


DEFINITIONS = (
    Definition(
        "keyword accuracy",
        "Share of answers in which the label occurs anywhere: short_answer.lower() in predicted.lower().",
        "The metric of the published prediction files (36.0 % for zero-shot Qwen2-VL-7B on video 002-004).",
        'It counts "no" in "normal" and "down" in "downward", and an answer that names every label is right.',
    ),
    Definition(
        "word accuracy",
        r"Share of answers in which the label occurs between word boundaries: \blabel\b, ignoring case.",
        "The metric of the dataset's paper.",
        '"left" in "upper-left" counts, "downward" for "down" does not, and "not left but right" states both.',
    ),
    Definition(
        "label accuracy",
        "Share of answers that state the label as a word, and no other label of the question's type. A label after "
        "a negation is not stated. In a yes/no question, the first yes or no decides.",
        "Ours (surgvqa/evaluation/score.py); the reference answers score 100 %.",
        "An answer with a synonym that the references never use counts as wrong.",
    ),
    Definition(
        "majority accuracy",
        "The accuracy of always answering each question type's most frequent label in this file.",
        "The usual baseline; 64.8 % on the published test file.",
        "It uses the labels of the evaluation, which no model may see, so it is slightly too high for a fair "
        "comparison.",
    ),
    Definition(
        "training majority accuracy",
        "The same with each type's most frequent label in the training (--train_data_path).",
        "The honest baseline: the accuracy of a model that neither looks nor listens.",
        "It is low if training and evaluation have different shares of labels, which says nothing about the model.",
    ),
    Definition(
        "informative types",
        "Every accuracy again, only over question types with more than one label in this file.",
        "Ours.",
        "A type with a single label needs only one constant answer, which raises every average over all types.",
    ),
    Definition(
        "95 % interval",
        "Mean ± 1.96 · √(Σ_c s_c² · C/(C-1)) / n, where s_c sums the residuals y - ȳ of cluster c of C: samples of "
        "one video whose frames overlap or are at most 25 frame numbers (one second) apart, single linkage.",
        "Cluster-robust variance of a mean (Liang and Zeger 1986).",
        "Without the frames (--eval_data_path) samples count as independent, and it is too narrow; also with fewer "
        "than about 30 clusters. At 0 % and 100 % it has no width. It says nothing about other videos than those of "
        "the file.",
    ),
    Definition(
        "collapsed",
        "A type with at least two labels of which one has more than 90 % of the answers, or one is never given.",
        "Ours.",
        "A rare label may be absent by chance.",
    ),
    Definition(
        "paired difference",
        "Mean of the differences -1, 0, 1 of two models on the same samples, with the interval above.",
        "surgvqa compare.",
        "It compares two sets of answers, not two training methods: another seed may differ as much.",
    ),
    Definition(
        "exact McNemar",
        "Two-sided p of the flips under a fair coin: 2 · Σ_{k ≤ min(gained, lost)} C(flips, k) / 2^flips, at most 1.",
        "McNemar 1947, exact form.",
        "It assumes independent flips, but flips of one cluster are not: trust the clustered interval first.",
    ),
    Definition(
        "BLEU-4",
        "Geometric mean of the clipped 1- to 4-gram precisions of all sentences, times the brevity penalty.",
        "Papineni et al. 2002, by sacreBLEU: tokeniser 13a, with case, no smoothing.",
        'Most words of an answer are its template, so a wrong label scores high. A correct one-word answer ("No") '
        "scores 0.",
    ),
    Definition(
        "4-gram precision",
        "Clipped precision of 4-grams over all sentences, without brevity penalty: what the dataset's paper calls "
        "BLEU-4.",
        "sacreBLEU's fourth precision.",
        "A model whose only answer is one perfect sentence has 100 %. Not comparable with any other BLEU-4.",
    ),
    Definition(
        "ROUGE-L",
        "Mean F1 of the longest common subsequence of answer and reference.",
        "Lin 2004, by rouge-score, without stemming.",
        "As with BLEU-4, it mostly measures whether the template was learned.",
    ),
    Definition(
        "METEOR",
        "Mean of F_α (α 0.9) of matched words times the penalty 1 - 0.5 · (chunks / matches)³; words match exactly "
        "or by their Porter stem.",
        "Banerjee and Lavie 2005, by nltk, without WordNet: no synonyms.",
        "Lower than METEOR with synonyms; compare only with figures computed in the same way.",
    ),
)
