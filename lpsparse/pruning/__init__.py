"""What is cut: decide from the files alone, in constant memory, then apply. Never imports torch."""
