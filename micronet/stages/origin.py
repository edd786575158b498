"""What a network file records of how it was made, checked, in JSON values: for ``inspect`` and ``card``."""

from collections.abc import Mapping
from typing import Any

from micronet.data.spec import DataSpec
from micronet.errors import MicronetError


def origin_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``origin`` of a file, from what ``inspect`` tells of it."""
    return origin(about if about["kind"] == "artifact" else about["metadata"])


def origin(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an exported file's metadata, or an artifact's header, say of the network.

    Returns:
        ``model`` (``name`` and, if they are recorded, ``args``; or None), ``data`` (a DataSpec, or None), ``history``
        (the ``stage`` and the ``config`` of each), ``metrics``, ``versions`` and ``seed``, of foreign files all empty;
        and what else there is.

    Raises:
        MicronetError: The record of the data is damaged.
    """
    stages = recorded.get("history") or recorded.get("stages") or []
    if not isinstance(stages, list):
        raise MicronetError("the file's history is corrupted; export the network again")
    history = [each if isinstance(each, dict) else {"stage": each} for each in stages]
    data = recorded.get("data")
    return {
        **{key: value for key, value in recorded.items() if key not in ("stages", "model_args")},
        "model": _model(recorded),
        "data": DataSpec.from_json(data).to_json() if data else None,
        "history": [
            {**each, "stage": str(each.get("stage")), "config": _mapping(each.get("config"))} for each in history
        ],
        "metrics": _mapping(recorded.get("metrics")),
        "versions": {name: str(value) for name, value in _mapping(recorded.get("versions")).items()},
        "seed": recorded.get("seed"),
    }


def _model(recorded: Mapping[str, Any]) -> dict[str, Any] | None:
    model = recorded.get("model")
    found = model if isinstance(model, dict) else {"name": model}
    if not isinstance(found.get("name"), str):
        return None
    args = recorded.get("model_args", found.get("args"))  # packed files and old exports have none
    return {"name": found["name"], **({} if args is None else {"args": _mapping(args)})}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
