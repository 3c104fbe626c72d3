"""The settings of a sweep: their types (`schema`), their reader (`load`) and the YAML presets."""
