"""Our own files, and the folders of models."""
