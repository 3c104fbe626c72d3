"""A Ray cluster of two nodes on this machine, one CPU each, whose second node is killed and replaced on demand.

    python -m tests.end_to_end.two_nodes

In: lines on standard input; for each, the second node's raylet is killed and another node joins. Out: the cluster's
address, then a line for each replacement. The end of the input stops the cluster.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs.cluster import environment

environment.prepare()

from ray.cluster_utils import Cluster  # noqa: E402

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    second = cluster.add_node(**NODE)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
        second = cluster.add_node(**NODE)
        print("replaced", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
