"""Which sweeps `--seeds` asks for, and what wrong seeds are told."""

from __future__ import annotations

import pytest

from jobs.commands.seeds import parse_seeds, settings_of
from jobs.errors import RequestError
from search_spaces.load import SettingsError


def test_a_sweep_for_each_seed_differs_in_nothing_else() -> None:
    made = settings_of("tiny", ["lora.trials=3", "name=mine"], "0, 2")
    assert [(one.name, one.seed, one.lora.trials) for one in made] == [("mine-s0", 0, 3), ("mine-s2", 2, 3)]
    first, second = (one.model_dump(exclude={"name", "seed"}) for one in made)
    assert first == second


@pytest.mark.parametrize("text", ["", "0,a", "0,0", "0,00", "-1", "1,-2", "0,", "1.5", "0 1", "٣"])
def test_wrong_seeds_are_one_sentence(text: str) -> None:
    with pytest.raises(RequestError, match=r"--seeds: got .*whole numbers") as refused:
        parse_seeds(text)
    assert "\n" not in str(refused.value)


def test_seeds_and_a_seed_are_one_too_many() -> None:
    with pytest.raises(RequestError, match="together with seed=3"):
        settings_of("tiny", ["seed=3"], "0,1")


def test_what_settings_refuse_they_still_refuse() -> None:
    with pytest.raises(SettingsError, match="seed"):
        settings_of("tiny", [], f"0,{2**31}")
    with pytest.raises(SettingsError, match="name"):
        settings_of("tiny", [f"name={'n' * 63}"], "0,1")
