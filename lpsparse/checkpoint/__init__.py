"""What is on disk: open and check checkpoints, write them atomically with a manifest. Never imports torch."""
