"""Rows and texts of a sweep: seeded generators, shipped sentences, readers of a user's own files, leak checks.

In: settings (counts, seed, optional files). Out: `{train,validation,evaluation}.jsonl`, `text_{train,validation}.txt`
and `report.json`, written by `data.build.build_dataset`.
"""
