"""What a model is trained and measured on, one file per task."""
