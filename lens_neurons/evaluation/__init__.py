"""Scores of what interventions do: language of the output, Language Steering Shift, perplexity, forcing, contexts."""
