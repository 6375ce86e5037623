"""Prove it: what is zero, what it cost, who can open it. Measured from files alone. Never imports torch."""
