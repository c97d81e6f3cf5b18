"""Broken files, flags and settings, tried on the real command lines: a table and its runner."""
