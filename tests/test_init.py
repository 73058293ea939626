import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sd_guard


def test_the_import_is_light() -> None:
    code = (
        "import sys, sd_guard; dir(sd_guard); sd_guard.__version__; "
        "print(*{'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", sd_guard.__all__)
def test_exports(name: str) -> None:
    exported = getattr(sd_guard, name)
    assert exported.__name__ == name
    assert exported.__module__.startswith("sd_guard.")
    assert name in dir(sd_guard)


def test_no_such_name() -> None:
    with pytest.raises(AttributeError, match="module 'sd_guard' has no attribute 'Gaurd'"):
        sd_guard.Gaurd  # noqa: B018


def test_version() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert sd_guard.__version__ == project["project"]["version"]
