"""Programs that fine-tune real models."""
