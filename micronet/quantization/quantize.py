"""Quantizing a network: the choice of which tensors are quantized, and which module holds each quantizer.

There is one quantizer per tensor. A tensor is identified by its origin, the graph node that computed its values, and
the quantizer sits in the output slot of that node's module, so all readers see the same numbers. The inputs of
convolutions, linear layers and average pools are quantized, and so are the inputs of adds and concatenations between
layers (a runtime adds in integers only if both inputs are quantized). In a network that cannot be traced, only the
layers' own inputs are quantized.
"""

from collections.abc import Mapping
from dataclasses import asdict

from torch import fx, nn

from micronet.artifact.header import StageRecord
from micronet.errors import MAX_NAMES, MicronetError, by_reason, listed
from micronet.graph import ops
from micronet.graph.rewrite import Branch, branch_name, tap_name
from micronet.graph.trace import Graph, trace
from micronet.models import transformer
from micronet.models.computed import is_computed
from micronet.models.device import Example
from micronet.models.modes import copy_model
from micronet.quantization.config import FIRST_OR_LAST, FLOAT_BITS, QuantConfig
from micronet.quantization.dry_run import find_idle
from micronet.quantization.layers import has_weight_slot
from micronet.quantization.placement import Placement
from micronet.quantization.placer import READS_8BIT, LayerPlacer, Placer, Rule

_COMPUTED = "weight_norm or the like computes its weight; quantize with --mode ptq, then train with --mode qaft"


def quantize_model(
    model: nn.Module, config: QuantConfig, example: Example | None = None
) -> tuple[nn.Module, StageRecord]:
    """Return a copy of a float network with quantizers placed, and the record that rebuilds it.

    The quantizers have no ranges yet: call ``calibrate``, or train inside ``observing``. The layers that stay float are
    in ``record.result["left_float"]``, a dictionary from layer name to reason.

    Args:
        model: The network.
        config: Which tensors are quantized, and how.
        example: An input, or a tuple of inputs. A forward that torch.fx cannot trace symbolically is traced while it
            runs on the example; without one, only the layers' own inputs are quantized. Quantizers without effect on
            the example's output are removed, and their layers stay float.

    Raises:
        MicronetError: Nothing in the network can be quantized.
    """
    placement = _place(model, config, example)
    quantized = placement.apply(copy_model(model))
    if example is not None and (idle := find_idle(quantized, example)):
        placement.remove(idle)
        if not placement.inputs:
            raise MicronetError(f"nothing can be quantized: {'; '.join(dict.fromkeys(idle.values()))}")
        quantized = placement.apply(copy_model(model))
    return quantized, StageRecord("quantize", config.to_json(), asdict(placement))


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Return the model with the quantizers that a record describes, uncalibrated."""
    return Placement.from_json(record.result).apply(model)


def _place(model: nn.Module, config: QuantConfig, example: Example | None) -> Placement:
    heads = transformer.splittable_attentions(model)
    graph = trace(transformer.with_split_attentions(model), example) if heads else None
    if graph is None:  # a forward may read an attention's own tensors
        heads, graph = [], trace(model, example)
    placement = (LayerPlacer(model, config) if graph is None else _GraphPlacer(graph, config)).placement
    placement.attention = heads
    if graph is not None:
        placement.plain, placement.recorded = bool(graph.plain), graph.recorded
    for name, module in (model if graph is None else graph.model).named_modules():
        if isinstance(module, nn.MultiheadAttention):
            placement.left_float[name] = "MultiheadAttention uses packed weights"
        elif has_weight_slot(module):
            if name not in placement.inputs:
                placement.left_float.setdefault(name, "forward() never calls it as a module")
        elif isinstance(module, (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)):
            placement.left_float[name] = (
                _COMPUTED if is_computed(module) else f"{type(module).__name__} is not supported"
            )
    if not placement.inputs:
        raise _nothing_placed(placement.left_float)
    return placement


def _nothing_placed(left_float: Mapping[str, str]) -> MicronetError:
    """Return the error for a network whose layers all stay float, for these reasons."""
    reasons = by_reason(left_float)
    if not reasons:
        return MicronetError(
            "the network has no convolution or linear layers to quantize; define them as modules, not function calls"
        )
    named = "; ".join(f"{listed(names, MAX_NAMES)} ({why})" for why, names in reasons.items())
    cure = "; to quantize the first and last layers, too, add --first-last 8bit" if FIRST_OR_LAST in reasons else ""
    return MicronetError(f"no layer would be quantized: {named}{cure}")


class _GraphPlacer(Placer):
    """Places the quantizers of a traced network."""

    def __init__(self, graph: Graph, config: QuantConfig) -> None:
        self._graph = graph
        self._layers = {node: module for node, module in graph.calls() if has_weight_slot(module)}
        first = {str(node.target) for node in self._layers if self._source(node).op == "placeholder"}
        last = {str(node.target) for node in self._layers if not self._has_layer_after(node)}
        super().__init__(config, [str(node.target) for node in self._layers], first | last)
        self._outputs: dict[fx.Node, tuple[str, Rule]] = {}  # a node's quantizer and the rule it was made by
        for node, module in self._layers.items():
            self._place_layer(node, module)
        if config.bn_fuse:
            self.placement.fused = [list(pair) for pair in graph.conv_bn_pairs() if self._can_fold(*pair)]
            if not self.placement.fused:
                raise MicronetError("--bn-fuse found no quantized convolution followed by a batch norm; drop --bn-fuse")
        if config.a_bits not in (FLOAT_BITS, "binary"):
            self._place_reads()
        if config.computes_in_integers:
            self._place_results()
        for node in graph.fx.nodes:
            if node.op == "call_function" and ops.WEIGHTED.matches(node):
                self.placement.left_float[f"{node.name}()"] = "a function call, not a module"

    def _place_layer(self, node: fx.Node, layer: nn.Module) -> None:
        name, source = str(node.target), self._source(node)
        rule = self._rule(name)
        if rule == "float":
            return
        if name not in self.placement.inputs:
            self._quantize_weight(name, layer, rule)
        self.placement.inputs[name] = None
        if self._config.a_bits == FLOAT_BITS:
            return
        if self._config.a_bits == "binary" and rule == "same":
            self.placement.inputs[name] = self._binarize(node)
        elif self._graph.call_count(layer) > 1:  # each call's input has its own scale, so the bias has no single unit
            self._quantize_output(source, rule)
        elif source.op == "placeholder":
            self.placement.inputs[name] = self._quantize_input(name, rule)
        else:
            self.placement.inputs[name] = self._quantize_output(source, rule)

    def _can_fold(self, layer: str, norm: str) -> bool:
        """Return True if a quantized convolution can fold its batch norm while training."""
        convolution = isinstance(self._graph.model.get_submodule(layer), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        affine = getattr(self._graph.model.get_submodule(norm), "affine", False)
        return convolution and affine and "weight_quantizer" in self.placement.quantizers.get(layer, {})

    def _source(self, layer: fx.Node) -> fx.Node:
        return self._graph.origin(layer.all_input_nodes[0])

    def _binarize(self, node: fx.Node) -> str:
        """Put a sign directly before a layer, after any pool, and drop the ReLU there (its sign would be constant).

        If other nodes read that tensor or the ReLU's output, the layer gets a branch with a sign of its own.
        """
        read = node.all_input_nodes[0]
        if read.op == "placeholder":
            return self._quantize_input(str(node.target), "same")
        before = read
        while self._graph.preserves_values(before) or self._graph.matches(before, ops.AVERAGE):
            before = before.all_input_nodes[0]
        relu = before if self._graph.matches(before, ops.ANY_RELU) else None
        if relu is None and self._graph.is_non_negative(read):
            raise MicronetError(
                f"the input of {node.target} is never negative, so its sign would be constant; exclude the layer with "
                f"--exclude {node.target}"
            )
        shared = relu is not None and len(relu.all_input_nodes[0].users) > 1
        if relu is not None and shared and getattr(self._graph.module(relu), "inplace", False):
            raise MicronetError(
                f"{relu.target} modifies in place a tensor that is used again, so it cannot be replaced by a sign "
                f"function; set inplace=False in the model, or exclude the layer with --exclude {node.target}"
            )
        if not self._only_signs_read(relu or read):
            split = next((known for known in self.placement.splits if known.read == read.name), None)
            if split is None:
                split = Branch(read.name, relu.name if relu else None, [])
                self.placement.splits.append(split)
            split.readers.append(node.name)
            place = branch_name(read.name)
            self.placement.put(place, "output_quantizer", self._activation_quantizer("same", non_negative=False))
            return f"{place}.output_quantizer"
        if relu is not None and str(relu.target) not in self.placement.dropped:
            self.placement.dropped.append(str(relu.target))
        return self._quantize_output(read, "same")

    def _only_signs_read(self, start: fx.Node) -> bool:
        """Return True if only layers that get a sign read the output of a module that is called once."""
        module = self._graph.module(start)
        if module is None or self._graph.call_count(module) > 1:
            return False
        waiting = list(start.users)
        while waiting:
            node = waiting.pop()
            passes = self._graph.preserves_values(node) or self._graph.matches(node, ops.AVERAGE)
            if passes and self._graph.module(node) is not None:
                waiting += node.users
            elif node not in self._layers or self._rule(str(node.target)) != "same":
                return False
        return True

    def _place_reads(self) -> None:
        """Quantize the inputs of average pools, adds and concatenations, which lets runtimes compute in integers."""
        for node in self._graph.fx.nodes:
            last = not self._has_layer_after(node)
            rule = self._config.edge if last else "same"
            if rule != "float" and (self._graph.matches(node, ops.AVERAGE) or (self._graph.is_join(node) and not last)):
                for source in map(self._graph.origin, node.all_input_nodes):
                    if self._comes_from_chosen(source):
                        self._quantize_output(source, rule)

    def _place_results(self) -> None:
        """Quantize what convolutions give, and products' inputs, where nothing else does, at 8 bits or more.

        A runtime computes a convolution in integers only if its output becomes integers at once, behind the batch norm
        that is folded into it and the ReLU that is fused with it; a product of two tensors, only if both are.
        """
        norms = dict(self._graph.conv_bn_pairs())
        for node, layer in self._layers.items():
            if str(node.target) in self.placement.inputs and isinstance(layer, ops.FORWARD_CONVOLUTIONS):
                result = self._fused_result(node, norms.get(str(node.target)))
                if self._graph.origin(result) not in self._outputs:
                    self._quantize_output(result, "8bit")
        for node in self._graph.fx.nodes:
            sources = [self._graph.origin(read) for read in self._graph.readable(node)]
            if self._graph.matches(node, ops.MULTIPLY) and len(sources) > 1 and self._has_layer_after(node):
                for source in sources:
                    if source not in self._outputs and self._comes_from_chosen(source):
                        self._quantize_output(source, "8bit")

    def _fused_result(self, node: fx.Node, norm: str | None) -> fx.Node:
        """Return the last node that a runtime computes together with a convolution."""
        if norm is not None:
            node = next(reader for reader in self._graph.readers(node) if reader.target == norm)
        after = node
        while len(readers := self._graph.readers(after)) == 1:
            after = readers[0]
            if self._graph.matches(after, ops.ANY_RELU):
                return after
            if not self._graph.matches(after, ops.MAX_POOL | ops.IDENTITY):
                break
        return node

    def _comes_from_chosen(self, source: fx.Node) -> bool:
        """Return True if a tensor comes from a chosen layer through single-input operations such as norms."""
        while source not in self._layers:
            if len(source.all_input_nodes) != 1:
                return source.op != "placeholder" and self._config.include is None
            source = source.all_input_nodes[0]
        return str(source.target) in self._chosen

    def _quantize_output(self, source: fx.Node, rule: Rule) -> str:
        """Add a quantizer to a node's output and return its name; a later request for 8 bits replaces fewer bits."""
        if source not in self._outputs or (rule in READS_8BIT and self._outputs[source][1] == "same"):
            module, place = self._graph.module(source), str(source.target)
            if module is None or self._graph.call_count(module) > 1:
                place = tap_name(source.name)
                if source.name not in self.placement.taps:
                    self.placement.taps.append(source.name)
            quantizer = self._activation_quantizer(rule, non_negative=self._graph.is_non_negative(source))
            if getattr(quantizer, "qmin", -1) == 0 and self._alone_in_place(source):
                self.placement.out_of_place.append(place)
            self.placement.put(place, "output_quantizer", quantizer)
            self._outputs[source] = f"{place}.output_quantizer", rule
        return self._outputs[source][0]

    def _alone_in_place(self, node: fx.Node) -> bool:
        """Return True if a node is an in-place ReLU on a layer's or batch norm's output that nothing else reads."""
        module = self._graph.module(node)
        if type(module) is not nn.ReLU or not module.inplace:
            return False
        read = node.all_input_nodes[0]
        return len(read.users) == 1 and (read in self._layers or isinstance(self._graph.module(read), ops.BATCH_NORMS))

    def _has_layer_after(self, node: fx.Node) -> bool:
        return bool(self._graph.reachable(node) & self._layers.keys())
