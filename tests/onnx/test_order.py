"""ONNX files whose nodes stand in another order than that of their execution."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from micronet.errors import MicronetError
from micronet.onnx.reader import read_onnx

ARMS = "then_branch = a () => (float[n, 4] ay) { ay = Neg(h) }, else_branch = b () => (float[n, 4] by) { by = Relu(h) }"
INS = "g (bool c, float[n, 4] x) => (float[n, 4] y)"


def _saved(path, body):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {INS} {{ {body} }}')
    proto.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    onnx.save(proto, path)
    return path


def test_nodes_are_sorted_by_what_they_and_their_branches_read(tmp_path):
    body = f"y = Add(i, x) i = If<{ARMS}>(c) h = MatMul(x, w)"
    read = read_onnx(_saved(tmp_path / "moved.onnx", body))
    onnx.checker.check_model(read, full_check=True)
    assert [node.op_type for node in read.graph.node] == ["MatMul", "If", "Add"]


def test_outputs_without_a_type_or_a_shape_get_the_inferred_one(tmp_path):
    path = _saved(tmp_path / "bare.onnx", f"h = MatMul(x, w) y = If<{ARMS}>(c) z = Relu(h)")
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.output.append(onnx.ValueInfoProto(name="z"))
    onnx.save(proto, path)
    read = read_onnx(path)
    onnx.checker.check_model(read, full_check=True)
    for output in read.graph.output:
        assert [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim] == ["n", 4]


def test_nodes_that_read_each_other_are_refused(tmp_path):
    with pytest.raises(MicronetError, match=r"round\.onnx .*the nodes Add, If read each other"):
        read_onnx(_saved(tmp_path / "round.onnx", f"h = Add(y, x) y = If<{ARMS}>(c)"))
