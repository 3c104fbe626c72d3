"""The stages of a sweep, one file each: what they need, what they run where, what they leave on disk."""
