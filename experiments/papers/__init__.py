"""Published results, one module each."""
