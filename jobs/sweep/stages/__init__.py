"""The stages of a sweep, one file each: their inputs, what they run and where, and what they write to disk."""
