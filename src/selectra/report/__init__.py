"""Tables, plots and a page from the files that others wrote; nothing is computed here that was not stored."""
