"""Packaging glue: every setting lives in settings.ini (nbdev 2.4)."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {key.removesuffix("_requirements"): shlex.split(value)
          for key, value in cfg.items() if key.endswith("_requirements")}


class WithReports(build_py):
    "Puts the report templates and the measured results into the package, where `reporting.templates` looks first."
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder in ("templates", "results"):
            for source in sorted((root / "reports" / folder).glob("*.*")):
                target = Path(self.build_lib) / cfg["lib_path"] / folder / source.name
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    license=cfg["license"].upper(),
    url=cfg["git_url"],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    include_package_data=True,
    cmdclass={"build_py": WithReports},
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
