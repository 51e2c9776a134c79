"""Showing what happened: text, progress. Views read plain data and never a loop."""
