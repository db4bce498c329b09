"""Captures of other tools become caches of ours, and caches become files for other tools."""
