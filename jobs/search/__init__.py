"""Ray Tune and Optuna: one study per search group, all trials in one pool, early stopping, plots.

In: search groups (a space and a number of trials each) and a trial function. Out: result files. Nothing else imports
Optuna or Tune.
"""
