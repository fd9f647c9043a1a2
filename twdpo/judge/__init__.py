"""The judge: its prompt, the model that reads it, the pass over all pairs, and the verbalised pass."""
