"""Data sets: embedded ones with their cards, and loaders of files and hub sets."""
