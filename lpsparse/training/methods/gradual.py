"""Gradual magnitude pruning: cut what the rising target asks for (Zhu and Gupta 2017, arXiv 1710.01878)."""

from lpsparse.training.methods import Method


class Gradual(Method):
    cuts = "rising"
