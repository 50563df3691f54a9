"""What pyproject.toml cannot say: a wheel carries the notebook series, and the stored results that it reads."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# As in prunekit/cli/notebooks.py; tests/test_setup.py holds them equal.
PARTS = (
    "notebooks/*.ipynb",
    "notebooks/exercises/*.py",
    "benchmarks/results/*.csv",
    "benchmarks/results/*.safetensors",
    "docs/guide.md",
)


class BuildWithSeries(build_py):
    """Copies the series into the package, in the layout of the repository."""

    def run(self) -> None:
        """Build the package; an editable install uses the series where it lies."""
        super().run()
        if self.editable_mode:
            return
        for path in (path for part in PARTS for path in sorted(ROOT.glob(part))):
            target = Path(self.build_lib) / "prunekit" / "series" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithSeries})
