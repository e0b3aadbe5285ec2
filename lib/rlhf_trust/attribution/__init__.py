"""Data attribution: per-example gradients, influence scores and what a stage's training data
contributed. For a run of your own: ``unrolled.attribute``."""
