"""LoRA, activation capture, base and delta transcoders: functions of data and settings that report by callback."""
