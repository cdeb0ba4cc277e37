"""Configurations: default.py holds every default once, each other file is a small diff whose
docstring carries its command."""
