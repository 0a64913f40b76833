"""pytest collects nbs/**/*.ipynb: one item per notebook, run in-process by execnb (the engine of nbdev_test).

  pytest                       notebooks as they are (exported cells run inside the notebook)
  pytest --nb-exported --cov   exported cells skipped, the installed package's names used instead:
                               the notebooks' tests then test the package, and coverage counts its lines
  pytest --nb-flags "slow"     also run cells marked with these tst_flags of settings.ini
"""
import importlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
EXPORTS = {"export", "exports", "exporti"}


def pytest_addoption(parser):
    parser.addoption("--nb-flags", default="", help="test flags to run that settings.ini's tst_flags skip")
    parser.addoption("--nb-exported", action="store_true", help="run notebook tests against the exported package")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and ROOT / "nbs" in file_path.parents:
        if not any(s[0] in "._" for s in file_path.relative_to(ROOT).parts):
            return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name=self.path.stem)


class CellError(Exception):
    pass


class NotebookItem(pytest.Item):
    def runtest(self):
        from execnb.shell import CaptureShell
        from nbdev.config import get_config
        from nbdev.frontmatter import FrontmatterProc
        from nbdev.process import NBProcessor

        cfg = get_config(path=ROOT)
        flags = set(cfg.tst_flags.split()) - set(self.config.getoption("--nb-flags").split())
        nb = NBProcessor(self.path, procs=FrontmatterProc, process=True).nb
        if str(getattr(nb, "frontmatter_", {}).get("skip_exec", False)).lower() == "true":
            pytest.skip("skip_exec in the front matter")
        dirs = lambda c: getattr(c, "directives_", {}) or {}
        mods = [f"{cfg.lib_name}.{dirs(c)['default_exp'][0]}" for c in nb.cells if "default_exp" in dirs(c)]
        exported = self.config.getoption("--nb-exported") and mods
        shell, at = CaptureShell(self.path), {}

        def skip(cell):
            d = dirs(cell)
            if cell.cell_type != "code" or "nbdev_export" + "(" in cell.source: return True
            if d.get("eval:", [""])[0].lower() == "false" or flags & d.keys(): return True
            at["cell"] = cell
            if exported and EXPORTS & d.keys():
                for m in mods:
                    names = vars(importlib.import_module(m))
                    shell.user_ns.update({k: v for k, v in names.items() if not k.startswith("__")})
                return True

        here, env = os.getcwd(), os.environ.get("IN_TEST")
        os.environ["IN_TEST"] = "1"
        os.chdir(self.path.parent)
        try:
            shell.run_all(nb, exc_stop=True, preproc=skip)
        except Exception:  # noqa: BLE001  whatever the notebook raised is the failure to show
            c = at["cell"]
            tb = shell.prettytb(fname=self.path).split("<ipython-input", 1)
            tail = 'File "<ipython-input' + tb[1] if len(tb) > 1 else tb[0]
            raise CellError(f"{self.path.relative_to(ROOT)}, cell {c.idx_} (id {c.get('id')})\n\n"
                            + "\n".join(f"  | {l}" for l in c.source.splitlines()) + f"\n\n{tail.rstrip()}") from None
        finally:
            os.chdir(here)
            os.environ.pop("IN_TEST") if env is None else os.environ.update(IN_TEST=env)

    def repr_failure(self, excinfo):
        return str(excinfo.value) if isinstance(excinfo.value, CellError) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, 0, str(self.path.relative_to(ROOT))
