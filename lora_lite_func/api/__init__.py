"""The verbs that take a model."""
