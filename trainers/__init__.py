"""LoRA, activation capture, base and delta transcoders: plain functions of data and settings that report by callback."""
