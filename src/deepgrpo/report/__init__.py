"""Views of a finished or running run: one HTML page (`deepgrpo report`), single trees in the terminal (`deepgrpo inspect`).

Everything is read from run directories; neither torch nor the model is needed.
"""
