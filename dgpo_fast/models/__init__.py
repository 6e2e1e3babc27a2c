"""The only room that knows a model: loading, weights, prompts as it reads them, and what its forwards cost."""
