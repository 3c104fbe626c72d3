"""What a study sweeps: the typed settings (`schema`), how they are read (`load`) and the YAML presets beside them."""
