"""MLflow: one writer, what a trial or cell becomes there, and how its page opens.

Results as they lie on disk come in, runs come out. Nothing else imports MLflow.
"""
