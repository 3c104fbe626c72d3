"""Plots of a study: PNGs if there is enough to show, none for a study that does not exist."""

import matplotlib
import optuna

from jobs.search.pictures import study_pictures


def stored(values):
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(study_name="one", storage=storage)
    for index, value in enumerate(values):
        trial = study.ask({"lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)})
        trial.suggest_categorical("r", [4, 8])
        if value is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value + index)
    return storage


def test_a_finished_study_has_three_pictures():
    before = dict(matplotlib.rcParams)
    pictures = study_pictures("one", stored([0.5, 0.3, None, 0.7, 0.4, 0.9]), "lora", "val_loss")
    assert dict(matplotlib.rcParams) == before, "the report's own pictures would look like Optuna's"
    assert set(pictures) == {"lora_history", "lora_importances", "lora_parallel"}
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())


def test_a_study_with_nothing_to_show_has_none():
    assert study_pictures("one", stored([0.5, None]), "lora", "val_loss") == {}
    assert study_pictures("other", stored([0.5, 0.4]), "lora", "val_loss") == {}
