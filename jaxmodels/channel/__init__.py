"""Channel mixers."""
