"""Packaging, driven by settings.ini (read with configparser: setuptools no longer ships pkg_resources)."""
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def lines(key):
    "The non-empty lines of a multi-line setting, each once."
    return list(dict.fromkeys(line.strip() for line in cfg.get(key, "").splitlines() if line.strip()))


extras = {key.removesuffix("_requirements"): lines(key) for key in cfg if key.endswith("_requirements")}
readme = Path("README.md")

COMMIT = Path(cfg["lib_path"], "COMMIT")  # in a source distribution, and in what is installed


def keep_commit(root):
    "Writes the commit that is built into the package below `root`; without a clone, what the source brought stays."
    git = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "--no-optional-locks"]
    try: head, changes = (subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
                          for words in (["rev-parse", "HEAD"],
                                        ["status", "--porcelain", "--untracked-files=no", "--", cfg["lib_path"]]))
    except (OSError, subprocess.CalledProcessError): return
    target = Path(root, COMMIT)
    target.unlink(missing_ok=True)
    target.write_text(head + "+changes" * bool(changes) + "\n")


class BuildWithData(build_py):
    "The package with the data sets and records that its commands read: outside a clone nothing else holds them."
    def run(self):
        super().run()
        if self.editable_mode: return
        package = Path(self.build_lib, cfg["lib_path"])
        shutil.rmtree(package / "data", ignore_errors=True)
        shutil.copytree("data", package / "data")
        if Path(".git").exists(): keep_commit(self.build_lib)


class SdistWithCommit(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        if Path(".git").exists(): keep_commit(base_dir)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    url=cfg["git_url"],
    project_urls={"Changes": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md", "Issues": f"{cfg['git_url']}/issues"},
    classifiers=lines("classifiers"),
    packages=find_packages(include=["flashoptim_nb", "flashoptim_nb.*"]),
    package_data={cfg["lib_name"]: ["py.typed", COMMIT.name, "cli/names.json"]},
    cmdclass=dict(build_py=BuildWithData, sdist=SdistWithCommit),
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts")},
    zip_safe=False,
)
