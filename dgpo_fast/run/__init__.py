"""What a run writes and prints: its folder, checkpoints, metrics and terminal output."""
