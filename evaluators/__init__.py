"""Measurements: interventions, reconstruction, behaviour, scoring, statistics, tables and figures.

In: models, transcoders, rows. Out: plain numbers, tables and files; nothing here schedules or tracks anything.
"""
