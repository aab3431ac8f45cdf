"""Calls of tools in what models write: events, formats, and the machine that reads answers."""
