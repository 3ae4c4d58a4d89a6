"""The run directory: its layout, file formats, readers, writers, and the facts of a saved tree. Loads no torch."""
