import re

import pytest

from micronet.cli.old_spellings import modern
from micronet.errors import MicronetError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("prune a.safetensors --percent 0.5 --normal_regular 8", "prune a.safetensors --percent 0.5 --regular 8"),
        ("quantize --q_type 1 --q_level 0 --w_bits 8", "quantize --q-type asym --q-level channel --w-bits 8"),
        ("quantize --q_type=0 --weight_observer=1", "quantize --q-type=sym --weight-observer=moving-average"),
        ("quantize --q-type asym --w_bits=4", "quantize --q-type asym --w-bits=4"),
        ("quantize --refine nin.safetensors --cpu", "quantize nin.safetensors --device cpu"),
        ("train --model_type 1 --wd 1e-5 --gpu_id 0", "train --model nin_gc --weight-decay 1e-5 --device cuda:0"),
        ("quantize --W 2 --A 2", "quantize --w-bits binary --a-bits binary"),
        ("quantize --bn_fuse 1 --q_type 0", "quantize --bn-fuse --q-type sym"),
        ("quantize --bn_fuse 0", "quantize"),
        ("quantize --W=3 --A=32", "quantize --w-bits=ternary --a-bits=32"),
        ("train --train_batch_size 50 --end_epochs 300", "train --batch-size 50 --epochs 300"),
        ("train --gpu_id 0,1", "train --device 0,1"),
        ("sparse-train -sr --s 0.0001 --model_type 0", "sparse-train --s 0.0001 --model nin"),
        ("sparse-train --sparsity-regularization a.safetensors", "sparse-train a.safetensors"),
        ("prune --percent 0.5 --model a.safetensors --save b.safetensors",
         "prune --percent 0.5 a.safetensors --output b.safetensors"),
        ("prune --model=a.safetensors --model_type 1", "prune a.safetensors"),
        ("prune a.safetensors --model net.py:Net", "prune a.safetensors --model net.py:Net"),
        ("prune --model=pkg.net:build a.safetensors", "prune --model pkg.net:build a.safetensors"),
        ("finetune --model_type 0 --refine a.safetensors", "finetune a.safetensors"),
        ("bn-fuse --W 2 a.safetensors", "bn-fuse a.safetensors"),
        ("bn-fuse --W=3 --A=2 a.safetensors -o b.safetensors", "bn-fuse a.safetensors -o b.safetensors"),
        ("train --resume --epochs 3", "train --resume --epochs 3"),
        ("quantize --mode ptq --ptq_batch 10", "quantize --mode ptq --calib-batches 10"),
        ("train -o a_b.safetensors -- --x_y", "train -o a_b.safetensors -- --x_y"),
    ],
)  # fmt: skip
def test_old_options_mean_what_they_meant(old, new):
    assert modern(old.split()) == new.split()


@pytest.mark.parametrize(
    ("old", "answer"),
    [
        ("train -sr --s 1e-4", "micronet sparse-train"),
        ("train --gc_refine 154 162 144", '{"widths": [154, 162, 144]}'),
        ("quantize --refine nin_finetune.pth", "micronet import --model nin --weights nin_finetune.pth"),
        ("prune --model models_save/nin_sparse.pth --save nin_prune.pth",
         "micronet import --model nin --weights models_save/nin_sparse.pth -o nin_sparse.safetensors, "
         "then micronet prune nin_sparse.safetensors"),
        ("train --model_type 0 --refine pruned.safetensors", "micronet finetune pruned.safetensors"),
        ("train --refine nin_prune.pth", "then micronet finetune nin_prune.safetensors"),
        ("quantize --prune_qaft nin.pth", "--mode qaft"),
        ("train --num_workers 4", "drop this option"),
        ("prune --model nin_gc_sparse.pth", "--model nin_gc"),
        ("train --resume nin.pth", "does not take a file"),
        ("train --gpu_id all", "--device 0,1"),
        ("prune --layers 9", "drop this option"),
        ("quantize --W 4", "binary (2), ternary (3)"),
        ("quantize --ptq", "--mode ptq"),
        ("train --model_type 7", "nin (0), nin_gc (1)"),
        ("quantize --q_type 5", "sym (0), asym (1)"),
    ],
)  # fmt: skip
def test_what_became_something_else_is_answered(micronet, old, answer):
    with pytest.raises(MicronetError, match=re.escape(answer)):
        modern(old.split())
    done = micronet(*old.split())
    assert done.code == 2
    assert answer.split()[0] in done.err
