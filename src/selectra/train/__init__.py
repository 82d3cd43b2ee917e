"""One training loop for every task, with what it needs around it."""
