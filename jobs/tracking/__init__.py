"""MLflow: the writer, the reader, the records of trials and bases, and how a sweep's page opens.

In: results as stored on disk. Out: MLflow runs. Nothing else imports MLflow.
"""
