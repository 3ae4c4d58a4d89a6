"""Reading of answers: their place in a response, and the numbers in them. Shared by rewards, tasks and votes."""
