"""How good is a reward? Order-consistent reward models on embeddings, and RM-Bench."""
