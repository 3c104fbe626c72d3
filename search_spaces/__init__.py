"""What a study sweeps: the typed settings (`schema`), how to read them (`load`), and the YAML presets beside them."""
