"""How many threads a run takes, and what is put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unipo.training.config import ConfigError, ControlConfig, RunConfig
from unipo.training.threads import WIDE, use_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    use_threads(0)
    torch.set_num_threads(before)


def test_narrow_networks_take_one_and_the_next_run_has_what_was_usual() -> None:
    for _ in range(2):
        use_threads(0, WIDE - 1)
        assert torch.get_num_threads() == 1
    use_threads(0, WIDE)
    assert torch.get_num_threads() == 2
    use_threads(0)
    assert torch.get_num_threads() == 2, "nothing is left to put back"


def test_what_is_asked_for_is_taken() -> None:
    use_threads(2, 8)
    assert torch.get_num_threads() == 2
    use_threads(1)
    assert torch.get_num_threads() == 1


def test_settings_of_speed_that_do_not_exist_are_named() -> None:
    for wrong in ({"compile": "maybe"}, {"autocast": "float16"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ControlConfig(**wrong)
    with pytest.raises(ConfigError, match="sampling-weights"):
        RunConfig(sampling_weights="int8")
