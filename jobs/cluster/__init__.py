"""Ray: starting or joining a cluster, fan-out over workers, watching the raylet, submitting a command.

In: addresses and tasks. Out: outcomes. Only this package and `search` talk to Ray.
"""
