"""Programs that measure the library: `examples` fine-tunes real models, `measure` times it."""
