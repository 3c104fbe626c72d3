"""LoRA, capture of activations, base and delta transcoders: functions of data and settings that report by callback."""
