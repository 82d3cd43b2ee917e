"""Language models: what they share, their state, generation, tokens, and the Hugging Face layout on disk."""
