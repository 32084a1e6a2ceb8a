"""Saves and loads variables and pruned models; writes appear whole or not at all."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxprune import trees
from jaxprune.errors import CheckpointError, first_line
from jaxprune.frameworks import FunctionHandle, handle_of
from jaxprune.frameworks.replay import Replayed, replay
from jaxprune.graph import ChannelGraph
from jaxprune.records import Plan, Slim

Path = str | pathlib.Path
_FORMAT = 1
_STATISTICS = ("mean", "var")


def _swap(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Replaces the directory `path` by what `write` leaves in an empty one.

    Until all is written the old directory stays; one that was put aside when the
    process died is found by `_settle`.
    """
    partial = path.with_name(f".{path.name}.partial")
    aside = path.with_name(f".{path.name}.aside")
    first = jax.process_index() == 0
    try:
        if first:
            _settle(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        _barrier("partial")
        write(partial)
        _barrier("written")
        if first:
            if path.exists():
                path.rename(aside)
            partial.rename(path)
            shutil.rmtree(aside, ignore_errors=True)
        _barrier("renamed")
    # Orbax reports a full disk as ValueError or RuntimeError with its own text.
    except (OSError, ValueError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {path}: {first_line(error)}; check that the directory is "
            "writable and the disk has space, what was there before is unchanged"
        ) from error


def _settle(path: pathlib.Path) -> None:
    """Puts a checkpoint back that a process died between two renames of."""
    aside = path.with_name(f".{path.name}.aside")
    if aside.exists() and not path.exists():
        aside.rename(path)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _write_arrays(path: pathlib.Path, tree: Any) -> None:
    # NumPy arrays carry no device: the files open on any number of devices.
    arrays = jax.tree.map(np.asarray, jax.device_get(tree))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)


def _read_arrays(path: pathlib.Path) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        return jax.tree.map(jnp.asarray, checkpointer.restore(path))


def _existing(path: Path) -> pathlib.Path:
    found = pathlib.Path(path).expanduser().absolute()
    _settle(found)
    if not found.exists():
        raise CheckpointError(f"there is no checkpoint at {found}; check the path")
    return found


def save_variables(path: Path, variables: Any) -> None:
    """Writes a tree of arrays to the directory `path` (orbax), replacing it whole.

    Raises:
      CheckpointError: it cannot be written; an earlier checkpoint is kept.
    """
    target = pathlib.Path(path).expanduser().absolute()
    _swap(target, lambda partial: _write_arrays(partial / "variables", variables))


def load_variables(path: Path) -> Any:
    """The variables in `path`: a directory of `save_variables` or `save`, or of orbax.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    found = _existing(path)
    inner = found / "variables"
    try:
        return _read_arrays(inner if inner.is_dir() else found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {found}: {first_line(error)}; expected a "
            "directory that jaxprune or orbax wrote"
        ) from error


def _read_npz(path: pathlib.Path) -> dict[str, Any]:
    """Leaves by full name of an npz whose keys leave the collection out."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            leaves = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {first_line(error)}; expected an npz file of arrays"
        ) from error
    named = {}
    for name, value in leaves.items():
        last = name.rpartition("/")[2]
        collection = "batch_stats" if last in _STATISTICS else "params"
        full = name.startswith(("params/", "batch_stats/"))
        named[name if full else f"{collection}/{name}"] = value
    return named


def _matched(path: Path, found: Mapping[str, Any], template: Any) -> Any:
    """`template` with the leaves of `found`. Raises CheckpointError, once for all."""
    expected = trees.flatten(template)
    problems = [
        f"{name}: expected shape {tuple(leaf.shape)}, found "
        + (f"{np.shape(found[name])}" if name in found else "none")
        for name, leaf in expected.items()
        if name not in found or np.shape(found[name]) != tuple(leaf.shape)
    ]
    problems += [
        f"{name}: the model has no such leaf, found shape {np.shape(value)}"
        for name, value in found.items()
        if name not in expected
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model, {len(problems)} leaves differ: "
            + "; ".join(problems)
            + "; choose the model and its widths as they were when it was saved"
        )
    leaves = {
        name: jnp.asarray(found[name], leaf.dtype) for name, leaf in expected.items()
    }
    return trees.unflatten_like(template, leaves)


def init_from(path: Path, template: Any) -> Any:
    """The variables saved at `path`, in the structure and dtypes of `template`.

    Args:
      path: a checkpoint directory, or an npz file with flat names such as
        "conv0/kernel"; names ending in mean or var are BatchNorm statistics, the
        others parameters.
      template: variables, or their shapes as `jax.eval_shape(model.init, ...)` gives.

    Raises:
      CheckpointError: missing or damaged; or names and shapes differ, all listed.
    """
    found = _existing(path)
    if found.suffix == ".npz":
        return _matched(path, _read_npz(found), template)
    return _matched(path, trees.flatten(load_variables(found)), template)


def save(path: Path, slim: Slim) -> None:
    """Writes a pruned model to the directory `path`: arrays, plan and report.

    Holds `variables/` (orbax) and `slim.json`. The report must be JSON-ready.

    Raises:
      CheckpointError: it cannot be written; an earlier checkpoint is kept.
    """
    if not isinstance(slim, Slim):
        raise CheckpointError(
            f"expected what jp.prune or jp.shrink returned, found {type(slim).__name__}; "
            "orbax saves any tree of arrays"
        )
    record = {
        "format": _FORMAT,
        "plan": slim.plan.to_json(),
        "report": dict(slim.report),
        # What a wrapped module needs beside the shapes, such as GroupNorm's groups.
        "settings": slim.report.get("settings", ()),
        # Such a function is made of the original's program, not of its source.
        "replayed": isinstance(slim.model, Replayed),
        "dicts": trees.of_dicts(slim.variables),
    }

    def write(partial: pathlib.Path) -> None:
        _write_arrays(partial / "variables", slim.variables)
        if jax.process_index() == 0:
            (partial / "slim.json").write_text(json.dumps(record, indent=1) + "\n")

    _swap(pathlib.Path(path).expanduser().absolute(), write)


def load(path: Path, model: Any) -> Slim:
    """The pruned model that `save` wrote.

    Nothing in the directory is executed: the smaller module is built from `model`, and
    its widths follow from the shapes of the arrays.

    Args:
      path: the directory.
      model: the original architecture: a Linen module, or an NNX object of the
        original sizes (its weights are not used). For what `shrink(replay=True)`
        made, and for functions of other trees than dicts, the graph that `trace`
        returns for the original.

    Raises:
      CheckpointError: missing, damaged, of another format, or `model` is no graph
        where one is needed.
    """
    found = _existing(path)
    try:
        record = json.loads((found / "slim.json").read_text())
        version, plan, report = record["format"], record["plan"], record["report"]
        settings = tuple(tuple(row) for row in record["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{found} does not hold a pruned model ({first_line(error)}); expected a "
            "directory that jaxprune.save wrote, with slim.json and variables/"
        ) from error
    if version != _FORMAT:
        raise CheckpointError(
            f"{found} has format {version}, this jaxprune reads {_FORMAT}; load it "
            "with the version that wrote it"
        )
    variables, kept = load_variables(found), Plan.from_json(plan)
    given = isinstance(model, ChannelGraph)
    if given:
        variables = trees.unflatten_like(model.variables, trees.flatten(variables))
        if record.get("replayed"):
            return Slim(replay(model, kept), variables, kept, report)
        model = model.handle.model
    if record.get("replayed"):
        raise CheckpointError(
            f"{found} holds a model that shrink(replay=True) made: expected the graph "
            "of the original, whose program is replayed at the smaller sizes, found "
            f"{type(model).__name__}; call jp.load(path, jp.trace(model, variables, "
            "x)), for which shapes of the original variables are enough"
        )
    handle = handle_of(model).rebuild(variables, settings)
    lost = not given and not record.get("dicts", True)
    if lost and isinstance(handle, FunctionHandle):
        raise CheckpointError(
            f"{found} holds parameters that are no tree of dicts alone: expected the "
            "graph of the original, which knows their form, found "
            f"{type(model).__name__}; call jp.load(path, jp.trace(model, variables, "
            "x)), for which shapes of the original variables are enough"
        )
    return Slim(handle.model, variables, kept, report)
