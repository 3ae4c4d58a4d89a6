"""What a finished or running run shows: one HTML page (`deepgrpo report`), and single trees in the terminal (`inspect`).

Reads run directories only; nothing here needs torch or the model.
"""
