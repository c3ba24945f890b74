"""Models built from the mixers."""
