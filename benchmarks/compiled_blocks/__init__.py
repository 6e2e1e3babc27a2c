"""Launches and bytes of the code that torch.compile makes for a named GPU, counted without one."""
