"""Set-up shared by all tests: what they spend most time on, compiling, is made short.

A compilation cache outlives the run, and XLA leaves out most optimisations (the suite
takes two thirds of the time; JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs it as users do).
"""

import os
import pathlib

import jax

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"


def pytest_configure() -> None:
    directory = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # In the environment, for the processes that tests start.
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
        jax.config.update("jax_disable_most_optimizations", True)
