"""Tables: cells pooled over prompts and seeds, with intervals.

Plain numbers come in, pandas tables come out. No model is ever loaded.
"""
