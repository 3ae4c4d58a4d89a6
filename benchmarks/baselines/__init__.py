"""The same work done by other libraries, for comparison. None of them is needed: an arm whose library is absent is left out."""
