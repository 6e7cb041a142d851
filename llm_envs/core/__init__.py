"""The machinery that every environment shares."""
