"""What a merge will cost, told before it starts: only headers and configurations are read."""
