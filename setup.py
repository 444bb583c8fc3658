"""Packaging, driven by settings.ini (read with configparser: setuptools no longer ships pkg_resources)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def lines(key):
    "The non-empty lines of a multi-line setting, each once."
    return list(dict.fromkeys(line.strip() for line in cfg.get(key, "").splitlines() if line.strip()))


extras = {key.removesuffix("_requirements"): lines(key) for key in cfg if key.endswith("_requirements")}
readme = Path("README.md")

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
    package_data={cfg["lib_name"]: ["py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts")},
    zip_safe=False,
)
