"""Maths on tensors and plans of indices. Knows no module and no adapter."""
