"""Ray Tune and Optuna: one study per group, all trials in one pool, early stopping, plots.

In: groups and a trial function. Out: result files. Nothing else imports Optuna or Tune.
"""
