"""A report as one page that stands alone: no script, no request, figures drawn here."""
