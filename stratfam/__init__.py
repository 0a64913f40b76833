"""A crypto strategy family that cannot fool its owner.

The one hand-written module: it must run before numba is imported. numba's file cache does not notice a change in a
function that a cached one calls from another module, so the cache lives in a folder named by the digest of all
exported sources: any edit to the gate gives the kernel a fresh cache.
"""
__version__ = "0.1.0"


def source_digest() -> str:
    "Digest of every exported source file: names the numba cache, and is the code digest's first part."
    import hashlib
    from pathlib import Path
    root, h = Path(__file__).parent, hashlib.sha256()
    for p in sorted(root.rglob("*.py")):
        if p.name != "_modidx.py": h.update(p.relative_to(root).as_posix().encode() + b"\0" + p.read_bytes() + b"\0")
    return h.hexdigest()


def _numba_cache() -> None:
    "Point numba at a cache keyed by `source_digest`, unless the user chose a folder; works before and after numba is loaded."
    import os
    import sys
    from pathlib import Path
    if "NUMBA_CACHE_DIR" in os.environ: return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = str(Path(base) / "stratfam" / "numba" / source_digest()[:16])
    os.environ["NUMBA_CACHE_DIR"] = folder
    if "numba" in sys.modules: sys.modules["numba"].config.CACHE_DIR = folder


_numba_cache()


def __getattr__(name: str):
    "`stratfam.backtest(df, weights)` without importing numba and pandas until it is asked for."
    if name == "backtest":
        from stratfam.market.backtest import backtest_frame
        return backtest_frame
    raise AttributeError(f"module 'stratfam' has no attribute {name!r}")
