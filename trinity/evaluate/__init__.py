"""Scores of models in tasks of our own and of lm-eval, and the exams of a run that gates heed."""
