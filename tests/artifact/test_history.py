from pathlib import Path

import pytest

from micronet import registry
from micronet.errors import MicronetError

STAGES = ["train", "import", "sparse-train", "prune", "finetune", "quantize", "bn-fuse"]
LEGAL = {  # stage -> what may be in the history already
    "sparse-train": {"train", "import", "sparse-train", "prune", "finetune"},
    "prune": {"train", "import", "sparse-train", "prune", "finetune"},
    "finetune": {"train", "import", "sparse-train", "prune", "finetune", "quantize"},
    "quantize": {"train", "import", "sparse-train", "prune", "finetune", "bn-fuse"},
    "bn-fuse": {"train", "import", "sparse-train", "prune", "finetune", "quantize"},
    "train": set(),
    "import": set(),
    "export-onnx": set(STAGES),
}


def check_order(history, name):
    stage = registry.load_object(registry.STAGES[name].stage)
    required = {"model": "nin"} if name == "import" else {} if name == "train" else {"artifact": Path("a.safetensors")}
    stage.configure(required).check_order(history)


@pytest.mark.parametrize("earlier", STAGES)
@pytest.mark.parametrize("stage", LEGAL)
def test_every_cell_of_the_order(stage, earlier):
    if earlier in LEGAL[stage]:
        check_order([earlier], stage)
    else:
        with pytest.raises(MicronetError) as caught:
            check_order([earlier], stage)
        assert stage in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_beginning_needs_an_empty_history():
    check_order([], "train")
    check_order([], "import")
