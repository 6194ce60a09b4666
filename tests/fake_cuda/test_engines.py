"""Which engine serves a call on a GPU, and that the others stay on the device too."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fusedlstm
from fake_gpu import DEVICE, backward
from fusedlstm import cells, engines
from fusedlstm.engines import aten
from fusedlstm.kernels.cells import STEPS
from grids import grid

I, H, B, T = 10, 64, 4, 5
LAYERS = {
    "LSTM": fusedlstm.LSTM,
    "GRU": fusedlstm.GRU,
    "RNN": fusedlstm.RNN,
    "PeepholeLSTM": fusedlstm.PeepholeLSTM,
    "CoupledLSTM": fusedlstm.CoupledLSTM,
    "LayerNormLSTM": fusedlstm.LayerNormLSTM,
    "SLSTM": fusedlstm.SLSTM,
    "ResetBeforeGRU": fusedlstm.ResetBeforeGRU,
    "LayerNormGRU": fusedlstm.LayerNormGRU,
}


def chosen(cell="lstm", dtype=torch.bfloat16, hidden=H, directions=1, clipped=False, layout="dense") -> str:
    call = (DEVICE, dtype, cell, hidden, directions, clipped, layout)
    engine = engines.choose("auto", *call)
    if engine == "triton":
        assert engines.choose("triton", *call) == "triton"
    else:
        with pytest.raises(RuntimeError, match="backend='triton' cannot serve this call: "):
            engines.choose("triton", *call)
    return engine


@pytest.mark.parametrize("layout", ["dense", "packed", "ragged"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cell", cells.CELLS)
def test_the_kernels_serve_every_member(cell, dtype, directions, layout):
    expected = "torch" if dtype == torch.float64 or cell not in STEPS else "triton"
    assert chosen(cell, dtype, H, directions, layout=layout) == expected


def test_what_serves_a_member_without_kernels(gpu, caplog):
    module, x = fusedlstm.ResetBeforeGRU(I, H, device=DEVICE), torch.empty(T, B, I, device=DEVICE)
    with caplog.at_level("DEBUG", "fusedlstm"):
        module(x)
    found = fusedlstm.explain(module, x)
    assert found.engine == "torch" and f"engine torch: {found.why}" in caplog.text
    module.backend = "triton"
    with pytest.raises(RuntimeError, match="cannot serve this call: the kernels have no cell"):
        module(x)


def test_what_the_kernels_do_not_serve():
    assert chosen(clipped=True) == "torch"
    assert chosen(hidden=16384) == "triton"
    assert chosen(hidden=16384, layout="packed") == chosen(hidden=16384, layout="ragged") == "torch"
    assert chosen("layernorm", hidden=16384) == "torch"


# Arguments of the constructor and of the call, and whether cuDNN could serve that too.
RIVALS = {
    "plain": ({}, (), True),
    "layers, both directions": ({"num_layers": 2, "bidirectional": True, "batch_first": True}, (), True),
    "packed": ({}, ("packed",), True),
    "dropout": ({"num_layers": 2, "dropout": 0.5}, (), False),
    "states": ({"save": "states"}, (), False),
    "grad_clip": ({"grad_clip": 1.0}, (), False),
    "heads": ({"num_heads": 4}, (), False),
    "dropouts": ({"recurrent_dropout": 0.5}, (), False),
    "lengths": ({}, ("lengths",), False),
    "resets": ({}, ("resets",), False),
    "by name": ({"backend": "triton"}, (), False),
}


@pytest.mark.parametrize("layer", ["LSTM", "GRU", "RNN", "PeepholeLSTM"])
@pytest.mark.parametrize("rival", RIVALS)
def test_cudnn_is_asked_for_where_it_serves_the_whole_call(gpu, monkeypatch, rival, layer):
    given, wanted, serves = RIVALS[rival]
    serves = serves and layer != "PeepholeLSTM"
    monkeypatch.setattr(engines, "fastest", lambda call, index: asked.append((call, index)) or ("torch", "a test"))
    asked, served = [], []
    monkeypatch.setattr(aten, "stack", lambda *args: served.append(args) or (torch.empty(T, B, H), args[4]))
    module = LAYERS[layer](I, H, device=DEVICE, **given)
    x = torch.empty(T, B, I, device=DEVICE)
    keywords = {"lengths": torch.empty(B, device=DEVICE, dtype=torch.int32)} if "lengths" in wanted else {}
    keywords |= {"resets": torch.empty(T, B, device=DEVICE, dtype=torch.bool)} if "resets" in wanted else {}
    if "packed" in wanted:
        x = PackedSequence(x.flatten(0, 1)[:9], torch.tensor([4, 3, 2]))
    module(x, **keywords)
    assert len(asked) == len(served) == serves
    assert bool(gpu.launches) == (not serves)
    if serves:
        assert asked[0][1] == DEVICE.index and asked[0][0].layout == ("packed" if "packed" in wanted else "dense")


@grid(
    {
        "layer": list(LAYERS),
        "backend": ["torch", "reference"],
        "dtype": {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16},
        "options": {
            "plain": {},
            "layers": {"num_layers": 2, "bidirectional": True, "batch_first": True},
            "grad_clip": {"grad_clip": 1.0},
            "dropouts": {"recurrent_dropout": 0.5, "candidate_dropout": 0.1, "weight_dropout": 0.1},
        },
    }
)
def test_the_other_engines_stay_on_the_device(gpu, layer, backend, dtype, options):
    """But ATen's GRU, which wants a real one."""
    if layer == "GRU" and backend == "torch":
        options = options | {"grad_clip": 1.0}
    module = LAYERS[layer](I, H, device=DEVICE, dtype=dtype, backend=backend, **options)
    x = torch.empty(T, T, I, device=DEVICE, dtype=dtype, requires_grad=True)
    output = module(x)[0]
    found = backward([output], [torch.empty_like(output)])
    assert {id(leaf) for leaf in found} == {id(x), *map(id, module.parameters())}
    assert not gpu.launches
