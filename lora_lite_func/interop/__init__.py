"""Other libraries' files."""
