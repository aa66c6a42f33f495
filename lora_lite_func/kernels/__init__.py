"""Maths on tensors, and plans of indices. Nothing here knows a module or an adapter."""
