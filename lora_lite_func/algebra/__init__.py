"""Functions from adapters to adapters: trees, stacks, rows, optimizers. They take no model."""
