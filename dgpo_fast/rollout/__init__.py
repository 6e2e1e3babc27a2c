"""From prompts to scored groups: few-step sampling, with noise or without, now or once."""
