"""Metadata, extras, the console script and the start-up file of arf-plugin.

A start-up file is a ``.pth`` in site-packages whose import line Python runs when it starts. setuptools has no
way to ship one, so two build commands are extended here: ``build_py`` for wheels, and ``editable_wheel`` for
``pip install -e``. Both list the file in RECORD, so uninstalling the package removes it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import runpy
import shutil
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HERE = Path(__file__).parent
RELEASES = runpy.run_path(str(HERE / "arf_plugin" / "hooks" / "releases.py"))

# `.pth` is read by every Python; `.start` (PEP 829) replaces its import lines from Python 3.15 on.
STARTUP_FILES = {
    "arf_plugin.pth": "import arf_plugin._boot\n",
    "arf_plugin.start": "arf_plugin._boot:install\n",
}


PATCHES = HERE / "patches"

# Address of the repository on the web; empty until there is a public one.
REPOSITORY = ""


class BuildWithStartupFile(build_py):
    """Puts the start-up files at the top of the built library, which is site-packages once installed.

    The source patches, which lie beside the package in a checkout, go into it.
    """

    def run(self) -> None:  # noqa: D102
        super().run()
        if not self.editable_mode:
            for name, content in STARTUP_FILES.items():
                Path(self.build_lib, name).write_text(content)
            shutil.copytree(PATCHES, self._patches, dirs_exist_ok=True)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:  # noqa: D102
        built = [] if self.editable_mode else [str(Path(self.build_lib, name)) for name in STARTUP_FILES]
        if not self.editable_mode:
            built += [str(self._patches / path.relative_to(PATCHES)) for path in PATCHES.rglob("*.patch")]
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs + built

    @property
    def _patches(self) -> Path:
        return Path(self.build_lib, "arf_plugin", "patches")


class EditableWithStartupFile(editable_wheel):
    """Adds the start-up files to the finished editable wheel, with their lines in RECORD."""

    def run(self) -> None:  # noqa: D102
        super().run()
        for wheel in Path(self.dist_dir).glob("*editable*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                members = {info.filename: archive.read(info) for info in archive.infolist()}
            record = next(name for name in members if name.endswith(".dist-info/RECORD"))
            for name, content in STARTUP_FILES.items():
                digest = (
                    base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
                )
                members[name] = content.encode()
                members[record] += f"{name},sha256={digest},{len(content)}\n".encode()
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in members.items():
                    archive.writestr(name, data)


def version() -> str:
    """Reads ``__version__`` without importing the package."""
    for line in (HERE / "arf_plugin" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("arf_plugin/__init__.py has no __version__")


def long_description() -> str:
    """The README for the package index, where links into the repository and its pictures need a full address.

    Without an address, pictures are left out and links keep their text alone.
    """
    text = (HERE / "README.md").read_text(encoding="utf-8")
    relative = r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]*)\)"
    if REPOSITORY:
        return re.sub(
            relative, lambda m: f"{m[1]}[{m[2]}]({REPOSITORY}/{'raw' if m[1] else 'blob'}/main/{m[3]})", text
        )
    return re.sub(relative, lambda m: "" if m[1] else m[2], text)


setup(
    name="arf-plugin",
    version=version(),
    description="Anchor-based Robust Fine-tuning (ARF) as a plugin for the open_clip trainer",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="the arf-plugin authors",
    url=REPOSITORY,
    project_urls={
        **({"Source": REPOSITORY, "Issues": f"{REPOSITORY}/issues"} if REPOSITORY else {}),
        "Paper": "https://arxiv.org/abs/2404.06244",
        "open_clip": "https://github.com/mlfoundations/open_clip",
    },
    license="MIT",
    license_files=["LICENSE"],
    keywords=[
        "CLIP",
        "open_clip",
        "fine-tuning",
        "robustness",
        "distribution shift",
        "zero-shot",
        "WiSE-FT",
        "FLYP",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["arf_plugin", "arf_plugin.*"]),
    package_data={
        "arf_plugin": [
            "py.typed",
            "data/templates/*.txt",
            "evaluation/suites/*.yaml",
            "ablation/configs/*.yaml",
            "report/templates/*",
        ]
    },
    install_requires=[
        RELEASES["REQUIREMENT"],
        "torch>=2.6",  # before, weights_only could be got round (CVE-2025-32434)
        # The upper bound is that of open_clip's own `training` extra: later releases break its trainer.
        "webdataset>=0.2.5,<=0.2.86",
        "braceexpand",
        "filelock",
        "fsspec",
        "packaging",
        "pandas",
        "pyarrow",
        "pydantic>=2",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "captions": ["requests>=2.32", "transformers[sentencepiece]"],
        "retrieval": ["faiss-cpu", "requests>=2.32"],
        "download": ["img2dataset>=1.45"],
        "evaluation": [
            *("clip-benchmark", "jinja2", "matplotlib", "pyyaml", "requests"),
            *("scikit-learn", "scipy", "torchmetrics"),
        ],
        "completion": ["argcomplete"],
        # What scripts/emojinet needs beyond the package; the drawings depend on resvg's version.
        "emojinet": ["matplotlib", "resvg_py==0.5.0", "transformers"],
        # The documentation as a site: scripts/docs.sh.
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9,<10", "mkdocstrings[python]"],
        "dev": [
            *("hypothesis", "mypy", "pytest", "pytest-xdist", "ruff"),
            *("types-PyYAML", "types-requests", "types-tqdm"),
            *("brotli", "playwright"),  # the report's page in a real browser: tests/support/browser.py
        ],
    },
    entry_points={"console_scripts": ["arf = arf_plugin.cli.main:main"]},
    cmdclass={"build_py": BuildWithStartupFile, "editable_wheel": EditableWithStartupFile},
    zip_safe=False,
)
