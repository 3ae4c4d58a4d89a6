"""deepgrpo as a library: runs from Python objects, data frames, and pure functions for other trainers (docs/library.md)."""
