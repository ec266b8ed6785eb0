"""Reading, writing and checking anchor sets."""
