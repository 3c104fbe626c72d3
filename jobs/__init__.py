"""The command line, and all the code that talks to Ray, Optuna or MLflow."""
