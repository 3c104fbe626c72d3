"""How a sweep's MLflow page opens: as a tree of runs, with the columns that distinguish them.

In: a store. Out: experiment tags, which MLflow's pages read, and the end of the URL that opens the view. By default
MLflow would open a chart of prompts and traces, and load only the last hundred runs, often without their stages.
"""

from __future__ import annotations

import json

NAME = "deltascope"
COLUMNS = (
    "attributes.`Duration`",
    *(f"metrics.`{name}`" for name in ("val_loss", "val_fvu", "mean_ce", "kl")),
    *(f"params.`{name}`" for name in ("layer", "layers", "percentile", "d_new", "condition", "alpha", "subset")),
)
VIEW = {
    "searchFilter": "",
    "orderByKey": "attributes.start_time",
    "orderByAsc": True,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "modelVersionFilter": "All Runs",
    "datasetsFilter": [],
    "selectedColumns": list(COLUMNS),
}
TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    f"mlflow.sharedViewState.{NAME}": json.dumps(VIEW, sort_keys=True),
}


def page_of(experiment: str) -> str:
    """The part of the page's URL after the server's address."""
    return f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={NAME}"


def pages(store: str) -> list[tuple[str, str]]:
    """The name of every sweep tracked in a store, and its page's URL after the server's address."""
    from mlflow import MlflowClient

    experiments = MlflowClient(store).search_experiments(order_by=["name"])
    return [
        (experiment.name, page_of(experiment.experiment_id))
        for experiment in experiments
        if experiment.name != "Default"
    ]
