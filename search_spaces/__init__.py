"""The settings of a sweep: typed (`schema`), how to read them (`load`), and the YAML presets."""
