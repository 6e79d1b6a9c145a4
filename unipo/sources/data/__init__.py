"""Data of the user: files, typed records, faults told by row, filters."""
