"""lpsparse inside other people's programs."""
