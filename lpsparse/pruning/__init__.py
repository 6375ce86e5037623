"""Decide which weights go, from files alone and in constant memory, then cut them. Never imports torch."""
