"""Limits that a report meets or fails: a record for each kind of budget, and the check of a report."""
