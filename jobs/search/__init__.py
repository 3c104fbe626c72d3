"""Ray Tune and Optuna: one study a group, all trials in one pool, early stopping, and the studies' pictures.

Groups and a trial function come in, result files come out. Nothing else imports Optuna or Tune.
"""
