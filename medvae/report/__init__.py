"""JSON to HTML to PDF. `dossier` completes the JSON for a board; after it nothing computes a number."""
