"""What leaves a run: its weights with a model card, as a folder or as a model on the Hugging Face hub."""
