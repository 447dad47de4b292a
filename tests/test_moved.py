"""Former module paths keep working for one release."""

import importlib
import sys

import pytest

from lightning_grpo.moved import MOVED


@pytest.mark.parametrize("former", MOVED)
def test_a_former_path_gives_the_names_of_its_module_with_a_warning(former):
    current = importlib.import_module(f"lightning_grpo.{MOVED[former]}")
    sys.modules.pop(f"lightning_grpo.{former}", None)
    with pytest.warns(FutureWarning, match=f"lightning_grpo.{former} is now lightning_grpo.{MOVED[former]}"):
        module = importlib.import_module(f"lightning_grpo.{former}")
    names = [name for name, value in vars(current).items() if getattr(value, "__module__", None) == current.__name__]
    assert names and all(getattr(module, name) is getattr(current, name) for name in names)
