"""Run one named test against each planted bug, in plain Python (no compiling): a child process per bug, a JSON line per result.

The compiled functions are ordinary Python when numba's JIT is off. Records then come as `np.void`, which has no attributes, so
the record types are given a row class with a property for each field.
"""
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["NUMBA_DISABLE_JIT"] = "1"
import hypothesis  # noqa: E402
import numba  # noqa: E402, F401
import numpy as np  # noqa: E402
import pandas  # noqa: E402, F401
import pytest  # noqa: E402

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "stratfam"


def with_fields(dtype):
    "The same record type, whose rows answer `row.field` as compiled code does."
    def field(k): return property(lambda self: self[k], lambda self, v: self.__setitem__(k, v))
    return np.dtype((type("Row", (np.void,), {k: field(k) for k in dtype.names}), dtype))


def plain_records():
    "Give the record types of the risk and market rooms row classes."
    from stratfam.market import account
    from stratfam.risk import gate, limits
    for module in (limits, gate, account):
        for k, v in vars(module).copy().items():
            if isinstance(v, np.dtype) and v.names: setattr(module, k, with_fields(v))


def broken_copy(folder, file, old, new):
    "A copy of the package in `folder` with one text replaced; raises KeyError when the text is not there exactly once."
    shutil.copytree(PACKAGE, folder / "stratfam", ignore=shutil.ignore_patterns("__pycache__"))
    if not file: return
    path = folder / "stratfam" / file
    text = path.read_text()
    if text.count(old) != 1: raise KeyError(f"{file} has {text.count(old)} places that read {old!r}, expected 1: update the list of planted bugs")
    path.write_text(text.replace(old, new))


def attempt(folder, test):
    "Exit code of pytest for one test on the package in `folder`, and what it printed."
    sys.path[:0] = [str(folder), str(TESTS)]
    os.environ["PYTHONPATH"] = str(folder)
    os.chdir(TESTS)
    warnings.simplefilter("ignore")
    hypothesis.settings.register_profile("plain", phases=[hypothesis.Phase.generate])  # Found is enough: no shrinking
    hypothesis.settings.load_profile("plain")
    import stratfam
    assert Path(stratfam.__file__).is_relative_to(folder)
    plain_records()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), np.errstate(all="ignore"):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=line", "-W", "ignore", str(TESTS / test)])
    return int(code), said.getvalue()


def one(name, file, old, new, test):
    "Fork, break, test; a dict with `code` (pytest's exit code; 1 = caught) and `said`."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with tempfile.TemporaryDirectory() as folder:
            try: code, said = attempt_in(Path(folder), file, old, new, test)
            except BaseException as e:  # noqa: BLE001  the parent must hear of it
                code, said = -1, f"{type(e).__name__}: {e}"
            os.write(write, json.dumps({"name": name, "test": test, "code": code, "said": said[-1500:]}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: answer = f.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def attempt_in(folder, file, old, new, test):
    broken_copy(folder, file, old, new)
    return attempt(folder, test)


if __name__ == "__main__":
    for job in json.load(sys.stdin): print(json.dumps(one(*job)), flush=True)
