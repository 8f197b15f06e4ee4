"""JSON to HTML to PDF. Nothing here computes: every number stands in the JSON."""
