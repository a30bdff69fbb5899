"""The one way to show a run: tables, pictures, Markdown, JSON and TensorBoard."""
