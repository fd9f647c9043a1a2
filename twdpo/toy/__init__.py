"""The embedded default: the grammar of its pairs, what is planted in them, how its model was made, the model."""
