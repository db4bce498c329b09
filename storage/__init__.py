"""What lies on disk: arrays in, arrays out. Never imports torch."""
