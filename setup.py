"""The extension in C++, beside what pyproject.toml says: built where a compiler is, left out with a line where none is."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildNative(build_ext):
    """Hand the work to scripts/build_native.sh, which calls CMake."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        command = ["scripts/build_native.sh", str(target)]
        try:
            subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable})
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error  # optional: a warning


setup(
    ext_modules=[Extension("trinity._native", [], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
