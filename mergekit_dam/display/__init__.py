"""What a merge shows to people: a live display on a terminal, a few plain lines elsewhere."""
