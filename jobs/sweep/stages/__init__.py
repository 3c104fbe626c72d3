"""The stages of a sweep, one file each: what they need, what they run and where, and what they write to disk."""
