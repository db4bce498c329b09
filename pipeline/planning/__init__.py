"""What a run will take: bytes, hours, memory, parts; estimated, or measured on this machine."""
