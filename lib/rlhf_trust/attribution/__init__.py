"""Data attribution: per-example gradients, influence scores and what a stage's training data
contributed."""
