"""What decides on the quantizers of a traced network; see ``quantize`` for where they go."""

import itertools
from collections.abc import Collection
from operator import attrgetter

import torch
from torch import fx, nn

from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.graph.rewrite import Branch, branch_name, tap_name
from micronet.graph.trace import Graph
from micronet.quantization.calls import float_calls
from micronet.quantization.config import FLOAT_BITS, QuantConfig
from micronet.quantization.integer_joins import IntegerJoins
from micronet.quantization.layers import has_weight_slot
from micronet.quantization.placer import INFINITE, INFINITE_INPUT, READS_8BIT, Placer, Rule

CONSTANT = "it reads only stored tensors, so a runtime computes it once"


class GraphPlacer(Placer):
    """Places the quantizers of a traced network."""

    def __init__(self, graph: Graph, config: QuantConfig, infinite: Collection[str]) -> None:
        self._graph = graph
        self._layers = {node: module for node, module in graph.calls() if has_weight_slot(module)}
        first = {str(node.target) for node in self._layers if self._source(node).op == "placeholder"}
        last = {str(node.target) for node in self._layers if not self._has_layer_after(node)}
        super().__init__(config, [str(node.target) for node in self._layers], first | last, infinite)
        self._outputs: dict[fx.Node, tuple[str, Rule]] = {}  # a node's quantizer and the rule it was made by
        chosen = {node for node in self._layers if self._rule(str(node.target)) != "float"}
        self._joins = IntegerJoins(graph, chosen)
        for node, module in self._layers.items():
            self._place_layer(node, module)
        if config.bn_fuse:
            self.placement.fused = [list(pair) for pair in graph.conv_bn_pairs(repeated=False) if self._can_fold(*pair)]
            if not self.placement.fused:
                raise MicronetError("--bn-fuse found no quantized convolution followed by a batch norm; drop --bn-fuse")
        if config.a_bits not in (FLOAT_BITS, "binary"):
            self._place_reads()
        if config.computes_in_integers:
            self._place_results()
        self.placement.left_float |= float_calls(graph, {str(node.target) for node in self._layers})

    def _place_layer(self, node: fx.Node, layer: nn.Module) -> None:
        name, source = str(node.target), self._source(node)
        rule = self._rule(name)
        read = node.all_input_nodes[0]
        infinite = self._reads_infinity(name) or f"{branch_name(read.name)}.output_quantizer" in self._infinite
        padded = self._holds_infinity(source)  # and a pool behind it that has only finite values
        if rule == "float" or infinite or (padded and source is read):
            self.placement.left_float.setdefault(name, INFINITE_INPUT)
            return
        if source in self._graph.stored:
            self.placement.left_float[name] = CONSTANT
            return
        if name not in self.placement.inputs:
            self._quantize_weight(name, layer, rule)
        self.placement.inputs[name] = None
        if self._config.a_bits == FLOAT_BITS:
            return
        if self._config.a_bits == "binary" and rule == "same":
            self.placement.inputs[name] = self._binarize(node)
        elif (source.op == "placeholder" or self._is_overwritten(node)) and self._graph.call_count(layer) == 1:
            self.placement.inputs[name] = self._quantize_input(name, rule)
        else:
            float_outside = self._joins.is_float_sum(source) or self._is_result(source)
            apart = self._config.a_bits != "binary" and float_outside  # signs have the branches
            quantizer = self._quantize_branch(node, rule) if apart or padded else self._quantize_output(source, rule)
            if self._graph.call_count(layer) == 1:  # or each call's input has its own scale, so the bias has no unit
                self.placement.inputs[name] = quantizer

    def _is_overwritten(self, layer: fx.Node) -> bool:
        """Return True if other nodes write into what a layer reads after the node that made it, and before the layer.

        So do the experts of a mixture: each adds its rows to the same tensor.
        """
        source = self._source(layer)
        before = itertools.takewhile(lambda node: node is not layer, self._graph.fx.nodes)
        writers = (node for node in before if ops.writes_in_place(node) and not self._graph.preserves_values(node))
        written = (each for node in writers for each in (*node.args[:1], node.kwargs.get("out")))
        return any(isinstance(each, fx.Node) and self._graph.origin(each) is source for each in written)

    def _is_result(self, source: fx.Node) -> bool:
        """Return True if the network also returns a tensor that no runtime computes together with a layer."""
        module = self._graph.module(source)
        fused = self._graph.matches(source, ops.ANY_RELU | ops.MAX_POOL) or isinstance(module, ops.BATCH_NORMS)
        return source not in self._layers and not fused and self._is_returned(source)

    def _is_returned(self, node: fx.Node) -> bool:
        """Return True if the network returns a tensor, or its values in another shape or in part."""
        moved = (user for user in node.users if self._graph.matches(user, ops.PRESERVES_VALUES | ops.IDENTITY))
        return any(user.op == "output" for user in node.users) or any(map(self._is_returned, moved))

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
            return self._quantize_branch(node, "same", relu)
        if relu is not None and str(relu.target) not in self.placement.dropped:
            self.placement.dropped.append(str(relu.target))
        return self._quantize_output(read, "same")

    def _quantize_branch(self, layer: fx.Node, rule: Rule, relu: fx.Node | None = None) -> str:
        """Quantize what layers read for them alone, ahead of a ReLU, and return the quantizer's name.

        A later request for 8 bits replaces fewer bits, as in ``_quantize_output``.
        """
        read = layer.all_input_nodes[0]
        place = branch_name(read.name)
        split = next((known for known in self.placement.splits if known.read == read.name), None)
        if split is None or rule in READS_8BIT:
            self.placement.put(place, "output_quantizer", self._activation_quantizer(rule, non_negative=False))
        if split is None:
            split = Branch(read.name, relu.name if relu else None, [])
            self.placement.splits.append(split)
        split.readers.append(layer.name)
        return f"{place}.output_quantizer"

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
            rule = "same" if self._has_layer_after(node) else self._config.edge
            if rule != "float" and (self._graph.matches(node, ops.AVERAGE) or node in self._joins.nodes):
                tensors = (each for each in node.all_input_nodes if not self._graph.is_number(each))
                read = map(self._graph.origin, tensors)
                self._quantize_together([source for source in read if self._comes_from_chosen(source)], rule)

    def _place_results(self) -> None:
        """Quantize what convolutions give, and products' inputs, where nothing else does, at 8 bits or more.

        A runtime computes a convolution in integers only if its output becomes integers at once, behind the batch norm
        that is folded into it and the ReLU that is fused with it; a linear layer, if an activation follows that is
        fused with it, only if that one's output does; a product with what a convolution gives, only if both factors
        are. OpenVINO can also return floats: with ``float_outputs``, what no layer reads is left as it is.
        """
        norms = dict(self._graph.conv_bn_pairs())
        for node, layer in self._layers.items():
            if str(node.target) not in self.placement.inputs:
                continue
            if isinstance(layer, ops.FORWARD_CONVOLUTIONS):
                result: fx.Node | None = self._fused_result(node, norms.get(str(node.target)))
            else:
                result = self._fused_activation(node, norms.get(str(node.target)))
            if result is None or (self._config.float_outputs and not self._has_layer_after(result)):
                continue
            if self._graph.origin(result) not in self._outputs:
                self._quantize_together([result], "8bit")
        for node in self._graph.fx.nodes:
            sources = [self._graph.origin(read) for read in self._graph.readable(node)]
            multiplies = self._graph.matches(node, ops.MULTIPLY) and len(sources) > 1
            if multiplies and self._has_layer_after(node) and self._follows_convolution(node):
                new = [each for each in sources if each not in self._outputs and self._comes_from_chosen(each)]
                self._quantize_together(new, "8bit")

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

    def _fused_activation(self, node: fx.Node, norm: str | None) -> fx.Node | None:
        """Return the activation that a runtime computes together with a linear layer inside the network, or None."""
        readers = self._graph.readers(node)
        if norm is not None:
            readers = self._graph.readers(readers[0])
        fused = len(readers) == 1 and self._graph.matches(readers[0], ops.FUSED_BY_LINEAR)
        return readers[0] if fused and self._has_layer_after(readers[0]) else None

    def _follows_convolution(self, node: fx.Node) -> bool:
        """Return True if one of the layers just before a node is a convolution; linear layers can return floats."""
        ahead, seen = list(node.all_input_nodes), set[fx.Node]()
        while ahead:
            if (each := ahead.pop()) in seen:
                continue
            seen.add(each)
            if each not in self._layers:
                ahead += each.all_input_nodes
            elif isinstance(self._layers[each], ops.FORWARD_CONVOLUTIONS):
                return True
        return False

    def _comes_from_chosen(self, source: fx.Node) -> bool:
        """Return True if a tensor comes from a chosen layer through single-input operations such as norms."""
        while source not in self._layers:
            if len(source.all_input_nodes) != 1:
                return source.op != "placeholder" and self._config.include is None
            source = source.all_input_nodes[0]
        return str(source.target) in self._chosen

    def _quantize_together(self, sources: list[fx.Node], rule: Rule) -> None:
        """Add quantizers to the tensors that an operator reads, or to none if one of them holds infinity."""
        if not any(self._holds_infinity(source) for source in sources):
            for source in sources:
                self._quantize_output(source, rule)

    def _holds_infinity(self, node: fx.Node) -> bool:
        """Return True if infinity is in a tensor, known or stored; record that it stays float."""
        stored = node.op == "get_attr" and attrgetter(str(node.target))(self._graph.model)
        infinite = isinstance(stored, torch.Tensor) and bool(stored.isinf().any())
        if infinite or f"{self._place_of(node)}.output_quantizer" in self._infinite:
            name = str(node.target) if node.op in ("get_attr", "call_module") else f"{node.name}()"
            self.placement.left_float[name] = INFINITE
            return True
        return False

    def _place_of(self, source: fx.Node) -> str:
        """Return the module whose output slot quantizes a node's output: its own if called once, or else a tap.

        TorchScript modules have no slots.
        """
        module = self._graph.module(source)
        scripted = isinstance(module, torch.jit.ScriptModule)
        alone = module is not None and not scripted and self._graph.call_count(module) == 1
        return str(source.target) if alone else tap_name(source.name)

    def _quantize_output(self, source: fx.Node, rule: Rule) -> str:
        """Add a quantizer to a node's output and return its name; a later request for 8 bits replaces fewer bits."""
        if source not in self._outputs or (rule in READS_8BIT and self._outputs[source][1] == "same"):
            place = self._place_of(source)
            if place == tap_name(source.name) and source.name not in self.placement.taps:
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
