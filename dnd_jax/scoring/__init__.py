"""Scores: answers, candidates and competitors, intervals, results, the report, and
lm-evaluation-harness."""
