"""Adapters to adapters: trees, stacks, rows, optimizers. No model has a part in it."""
