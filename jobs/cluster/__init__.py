"""Ray: starting or joining a cluster, fan-out over workers, watching the raylet, submitting a command.

Addresses and tasks come in, outcomes come out. Ray is spoken to here and in `search` alone.
"""
