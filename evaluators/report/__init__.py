"""The report: findings, figures and pages.

Tables come in, files come out. No model is ever loaded.
"""
