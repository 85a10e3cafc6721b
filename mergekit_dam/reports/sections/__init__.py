"""The sections of the page, each a pure function of a report."""
