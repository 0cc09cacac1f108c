"""Measurements on increments: one file a question, each a function that returns a table."""
