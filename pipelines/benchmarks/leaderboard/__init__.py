"""Parts of the quality benchmark: rows, judges, fidelity, methods, cells and the rendered table."""
