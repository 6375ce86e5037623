"""Criteria rank weights without training: one file for each."""
