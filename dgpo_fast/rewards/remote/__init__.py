"""Rewards that run elsewhere: servers of ours, and judges behind an OpenAI-compatible API."""
