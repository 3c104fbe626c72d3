"""The command line, and every line that speaks to Ray, Optuna or MLflow."""
