"""A plan: what is done to a network, as settings of the stages that do it. It is written as a recipe."""

import hashlib
import json
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any, Literal

from micronet import registry
from micronet.core.parse import spell_toml
from micronet.quantization.config import FLOAT_BITS, INTEGER_BITS
from micronet.stages.stage import find, uses

CRITERION: Literal["l2"] = "l2"  # scores every layer, with batch norms or without
EPOCHS_OF_QAT = 1
Entry = dict[str, Any]  # one [[stage]] of a recipe


@dataclass(frozen=True)
class Plan:
    """What is done to a network.

    Attributes:
        widths: The width of each group of channels that may be cut; empty if none is.
        bits: Bits per weight; 32 if nothing is quantized.
        floats: The layers that stay in float although others are quantized.
        wide: The layers that keep 8 bits although others have fewer.
        epochs: The epochs of the trainings after pruning, one after the other.
        trained_bits: Whether quantization trains (QAT); otherwise it only calibrates (PTQ).
        learned_rounding: Whether PTQ learns the rounding of weights, layer by layer.
    """

    widths: tuple[int, ...] = ()
    bits: int | str = FLOAT_BITS
    floats: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    epochs: tuple[int, ...] = ()
    trained_bits: bool = False
    learned_rounding: bool = False

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.bits == FLOAT_BITS

    @property
    def has_few_bits(self) -> bool:
        """Whether weights have fewer bits than 8."""
        return self.bits not in (FLOAT_BITS, INTEGER_BITS)

    @property
    def trains(self) -> bool:
        """Whether a stage trains."""
        return bool(self.epochs) or self.trained_bits

    @property
    def form(self) -> tuple[Any, ...]:
        """What its latency depends on: all but its training."""
        return self.widths, self.bits, self.floats, self.wide

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object, without what it does not do."""
        return {name: value for name, value in vars(self).items() if value not in ((), False, FLOAT_BITS)}


@dataclass(frozen=True)
class Basis:
    """What all plans of a search share.

    Attributes:
        original: The file of the float network.
        options: Settings that every stage gets that has them: the data, the seed, the device.
        first: Settings of the first stage alone: the user's code that builds the network.
        runtime: Where the network is to run, a name of ``TARGETS``.
        multiple: Widths are multiples of this number.
        teaches: Whether the original's scores serve as soft labels in trainings.
        has_norms: Whether the network has batch norms.
        folds_norms: Whether ``bn-fuse`` can fold any.
    """

    original: Path
    options: dict[str, Any]
    first: dict[str, Any]
    runtime: str
    multiple: int = 1
    teaches: bool = True
    has_norms: bool = True
    folds_norms: bool = True

    def entries(self, plan: Plan) -> list[Entry]:
        """Return the stages of a plan, from the original to the deployed file, without names.

        An ONNX file is quantized at most, and is the deployed file itself.
        """
        found: list[Entry] = []
        is_file = self.original.suffix == ".onnx"
        if is_file and plan.is_float:
            return []
        if plan.widths:
            widths = ",".join(map(str, plan.widths))
            cut = {"widths": widths, "regular": self.multiple, "criterion": CRITERION, "skip_timing": True}
            found.append({"command": "prune", **cut})
        teacher = {"distill": str(self.original)} if self.teaches else {}
        found += [{"command": "finetune", "epochs": epochs, **teacher} for epochs in plan.epochs]
        if not plan.is_float:
            found += [{"command": "quantize", **self._bits(plan)}]
            found += [{"command": "bn-fuse"}] if self.folds_norms and not is_file else []
        found += [] if is_file else [self._export(plan)]
        found[0] = {**found[0], "artifact": str(self.original), **self.first}
        return [{**each, **self._shared(each["command"])} for each in found]

    def _bits(self, plan: Plan) -> dict[str, Any]:
        """Return the settings of ``quantize`` for a plan."""
        settings: dict[str, Any] = {"w_bits": plan.bits, "a_bits": INTEGER_BITS}
        if plan.has_few_bits:
            settings["first_last"] = "same"  # ``wide`` names the layers that keep 8 bits
        if self.runtime == "openvino" and self.original.suffix != ".onnx":
            settings["float_outputs"] = True
        if plan.trained_bits:
            settings |= {"mode": "qat", "epochs": EPOCHS_OF_QAT}
        elif plan.widths and not plan.epochs and self.has_norms:  # the statistics are those of the whole network
            settings |= {"mode": "ptq", "bn_reestimate": True}
        else:
            settings |= {"mode": "ptq", "bias_correct": True}
        if plan.learned_rounding:
            settings["reconstruct"] = "layer"
        for name, layers in (("exclude", plan.floats), ("keep_8bit", plan.wide)):
            if layers:
                settings[name] = ",".join(map(escape, layers))
        return settings

    def _export(self, plan: Plan) -> Entry:
        """Return the stage that writes the file for the runtime."""
        stage = registry.TARGETS[self.runtime]
        if stage not in registry.STAGES:
            return {"command": "export", "target": self.runtime, "skip_timing": True}
        settings = {"skip_timing": True, **({"low_bit_storage": True} if plan.has_few_bits else {})}
        return {"command": stage, **{name: value for name, value in settings.items() if uses(find(stage), name)}}

    def _shared(self, command: str) -> dict[str, Any]:
        """Return the shared settings that a command has; only the chosen network is tested, and not by its stages."""
        shared = {**self.options, "skip_test": True}
        return {name: value for name, value in shared.items() if uses(find(command), name)}


def shared_names(entries: list[Entry]) -> list[Entry]:
    """Return entries named after all that leads to them, so that equal beginnings of recipes are the same stages."""
    named, before = [], ""
    for entry in entries:
        before = hashlib.sha256(f"{before}{json.dumps(entry, sort_keys=True)}".encode()).hexdigest()
        named.append({"command": entry["command"], "name": f"{entry['command']}-{before[:12]}", **entry})
    return named


def final_names(entries: list[Entry], stem: str) -> list[Entry]:
    """Return entries named after their commands; what they make at the end is called ``stem``."""
    named: list[Entry] = []
    for entry in entries:
        command = entry["command"]
        number = 1 + sum(each["command"] == command for each in named)
        named.append({"command": command, "name": command if number == 1 else f"{command}-{number}", **entry})
    if not named:
        return []
    last = named[-1]
    artifact = {"artifact": Path(last.get("artifact", "network.safetensors"))}
    stage = find(last["command"]).configure({**artifact, **{k: last[k] for k in ("target", "mode") if k in last}})
    last["output"] = f"{stem}{stage.writes()}" if stage.writes() else f"{stem}_{last['target']}"
    if len(named) > 1:
        named[-2]["output"] = f"{stem}.safetensors"
    return named


def to_toml(entries: list[Entry], folder: Path, title: str) -> str:
    """Return entries as the text of a recipe."""
    lines = [f"# {title}", f"folder = {spell_toml(str(folder))}"]
    for entry in entries:
        lines += ["", "[[stage]]", *(f"{name} = {spell_toml(value)}" for name, value in entry.items())]
    return "\n".join(lines) + "\n"


def with_epochs(plan: Plan, epochs: int) -> Plan:
    """Return a plan with one more training."""
    return replace(plan, epochs=(*plan.epochs, epochs))
