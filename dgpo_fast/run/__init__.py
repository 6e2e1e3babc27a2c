"""What a run keeps and says: its folder, checkpoints, metrics and terminal."""
