"""MLflow: one writer, what a trial or cell becomes there, and how a sweep's page opens.

In: results as stored on disk. Out: MLflow runs. Nothing else imports MLflow.
"""
