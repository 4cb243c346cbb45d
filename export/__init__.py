"""Once per model, on the server: Hugging Face weights → bundle."""
