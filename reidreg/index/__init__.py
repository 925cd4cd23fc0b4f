"""A gallery on disk, and the search in it."""
