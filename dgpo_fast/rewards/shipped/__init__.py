"""Rewards that come with the package, each loaded when it is first named."""
