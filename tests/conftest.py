"""Set-up shared by all tests: a compilation cache that outlives the run."""

import os
import pathlib

import jax

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"


def pytest_configure() -> None:
    directory = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
