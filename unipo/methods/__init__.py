"""Methods: one page per family, kin together, and the catalog."""
