"""The report: findings, figures and pages.

Tables come in, files come out. No model is ever loaded.
"""

PAGE = "features.html"
"""The page with a card for each of the most effective features, next to report.html."""
