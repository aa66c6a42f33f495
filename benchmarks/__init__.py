"""Programs that measure the library: fine-tuning real models, timing against other implementations."""
