"""Export: the weights of a run as a model for other tools, with a model card (`deepgrpo export`)."""
