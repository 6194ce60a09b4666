"""Work in the calling thread alone (`fusedlstm.cpu`), as where threads sleep: nothing but the threads may be another."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import checkpoint

import fusedlstm
from fusedlstm import cpu

EXACT = {"rtol": 1e-10, "atol": 1e-12}
T, B, I, H = 6, 3, 5, 4


@pytest.fixture(autouse=True)
def threads_that_sleep(monkeypatch):
    """Two threads, and every call large enough."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "THREADS_SLEEP", True)
    monkeypatch.setattr(cpu, "LEAST_CALL", 0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def square(x):
    return (x.square(),)


def seen_by(seen):
    """A square that notes the threads that it runs with, forward and backward."""

    def call(x):
        seen.append(torch.get_num_threads())
        y = x.square()
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(torch.get_num_threads()))
        return (y,)

    return call


MODULES = {
    "lstm": lambda ours: (fusedlstm if ours else nn).LSTM(I, H),
    "two layers": lambda ours: (fusedlstm if ours else nn).LSTM(I, H, 2, bidirectional=True, batch_first=True),
    "dropout": lambda ours: (fusedlstm if ours else nn).LSTM(I, H, 3, dropout=0.5),
    "no bias": lambda ours: (fusedlstm if ours else nn).LSTM(I, H, bias=False),
    "projected": lambda ours: (fusedlstm if ours else nn).LSTM(I, H, proj_size=2),
    "gru": lambda ours: (fusedlstm if ours else nn).GRU(I, H, 2, dropout=0.5),
    "rnn": lambda ours: (fusedlstm if ours else nn).RNN(I, H, nonlinearity="relu"),
}


def pair(name, dtype=torch.float32):
    ours, stock = MODULES[name](True), MODULES[name](False)
    stock.load_state_dict(ours.state_dict())
    return ours.to(dtype), stock.to(dtype)


def gradients(module, x, **options):
    """Of output and final states by x and parameters; dropout draws the same masks every time."""
    torch.manual_seed(1)
    output, states = module(x)
    loss = output.sin().sum() + sum(s.square().sum() for s in (states if isinstance(states, tuple) else (states,)))
    return torch.autograd.grad(loss, [x, *module.parameters()], **options)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_results_and_gradients(monkeypatch, name, packed):
    """Those that the same module has with all threads, dropout's masks too, in a second backward as well."""
    (ours, _), x = pair(name), torch.randn(T, T, I, requires_grad=True)

    def found():
        torch.manual_seed(1)
        given = nn.utils.rnn.pack_padded_sequence(x, [6, 6, 3, 2, 2, 1], ours.batch_first) if packed else x
        output, states = ours(given)
        states = states if isinstance(states, tuple) else (states,)
        results = (output.data if packed else output, *states)
        loss = sum((r * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in results)
        inputs = [x, *ours.parameters()]
        return [*results, *torch.autograd.grad(loss, inputs, retain_graph=True), *torch.autograd.grad(loss, inputs)]

    alone = found()
    monkeypatch.setattr(cpu, "THREADS_SLEEP", False)
    torch.testing.assert_close(alone, found(), rtol=1e-5, atol=1e-6)


def test_threads():
    """One inside, forward and backward, all of them outside, also after errors; large work and small calls keep all."""
    seen = []
    x = torch.randn(3, requires_grad=True)
    (y,) = cpu.run(1, 1, seen_by(seen), x)
    assert seen == [1] and torch.get_num_threads() == 2
    y.sum().backward()
    assert seen == [1, 1] and torch.get_num_threads() == 2
    with torch.no_grad():
        cpu.run(1, 1, seen_by(seen), x)
    cpu.run(1, cpu.LARGEST_STEP + 1, seen_by(seen), x)
    assert seen == [1, 1, 1, 2]
    for broken in (lambda x: (x @ torch.ones(7),), lambda x: (x.sqrt().requires_grad_(),)):
        with pytest.raises(RuntimeError):
            cpu.run(1, 1, broken, x.clone()[:2])[0].backward(torch.ones(9))
        assert torch.get_num_threads() == 2


def test_small_calls_keep_the_threads(monkeypatch):
    monkeypatch.setattr(cpu, "LEAST_CALL", 11)
    seen = []
    for steps in (1, 2):
        cpu.run(steps, 10, seen_by(seen), torch.ones(2))
    assert seen == [2, 1]


@pytest.mark.parametrize("name", MODULES)
def test_differentiable_gradients(name):
    """Gradients of gradients, in float64, are those of torch.nn."""
    pairs, x = pair(name, torch.float64), torch.randn(T, T, I, dtype=torch.float64, requires_grad=True)
    found = []
    for module in pairs:
        first = gradients(module, x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *module.parameters()])
        found.append([*first, *second])
    torch.testing.assert_close(*found, **EXACT)


def test_many_gradients_at_once():
    x = torch.randn(3, requires_grad=True)
    (y,) = cpu.run(1, 1, square, x)
    (found,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(found, torch.diag(2 * x.detach()))


def test_a_graph_is_used_once():
    """As autograd has it: what was kept is freed by the first backward, and a second one is an error unless it was announced."""
    x = torch.randn(3, requires_grad=True)
    (y,) = cpu.run(1, 1, square, x)
    _, (result,) = y.grad_fn.recorded
    kept = weakref.ref(result)
    del result
    y.sum().backward()
    assert y.grad_fn.recorded is None and kept() is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_only_what_is_wanted():
    """Frozen weights get no gradient, and what gets none costs none."""
    (ours, _), x = pair("lstm"), torch.randn(T, B, I)
    for p in ours.parameters():
        p.requires_grad_(p is ours.weight_hh_l0)
    _, (h_n, _) = ours(x)
    h_n.sum().backward()
    assert [p.grad is not None for p in ours.parameters()] == [p is ours.weight_hh_l0 for p in ours.parameters()]
    for p in ours.parameters():
        p.requires_grad_(False)
    assert not ours(x)[0].requires_grad


def test_what_is_changed_in_place_is_noticed():
    x = torch.randn(3, requires_grad=True)
    seen = x * 1
    (y,) = cpu.run(1, 1, square, seen)
    seen.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_results_may_be_changed_in_place():
    """Those that the backward does not need, as torch.nn's."""
    pairs, found = pair("lstm"), []
    for module in pairs:
        torch.manual_seed(2)
        x = torch.randn(T, B, I, requires_grad=True)
        _, (h_n, _) = module(x)
        found.append(torch.autograd.grad(h_n.mul_(2).sum(), x))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    (ours, _), x = pair("dropout"), torch.randn(T, B, I, requires_grad=True)
    expected = gradients(ours, x)
    torch.manual_seed(1)

    def flat(x):  # the older kind of checkpoint loses gradients of tensors inside of tuples
        output, states = ours(x)
        return output, *states

    output, *states = checkpoint.checkpoint(flat, x, use_reentrant=reentrant)
    loss = output.sin().sum() + sum(s.square().sum() for s in states)
    loss.backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in ours.parameters())], [*expected])


def test_hooks_see_what_is_kept_once():
    """As of torch.nn's."""
    counts, x = [], torch.randn(T, B, I, requires_grad=True)
    for module in pair("lstm"):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda s, p=packed: p.append(s) or len(p) - 1, packed.__getitem__
        ):
            y = module(x)[0].sin().sum()
        torch.autograd.grad(y, x)
        counts.append(len(packed))
    assert counts[0] == counts[1] > 0


def test_transforms_see_the_operations():
    """torch.func, forward mode, tracing and subclasses of Tensor have rules for ATen's operations."""
    x = torch.randn(3)

    def run(x):
        return cpu.run(1, 1, square, x)[0]

    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x), 2 * x)
    torch.testing.assert_close(torch.func.vmap(run)(x.requires_grad_()), x.square())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(3))
        torch.testing.assert_close(forward_ad.unpack_dual(run(dual)).tangent, 2 * x)
    traced = torch.jit.trace(run, (x,))
    torch.testing.assert_close(traced(2 * x), 4 * x.square())


def test_cells():
    for name, ours in {
        "LSTMCell": fusedlstm.LSTMCell,
        "GRUCell": fusedlstm.GRUCell,
        "RNNCell": fusedlstm.RNNCell,
    }.items():
        mine = ours(I, H)
        stock = getattr(nn, name)(I, H)
        stock.load_state_dict(mine.state_dict())
        x, found = torch.randn(B, I, requires_grad=True), []
        for module in (mine, stock):
            h = module(x)
            h = h[0] + h[1] if isinstance(h, tuple) else h
            found.append(torch.autograd.grad(h.sin().sum(), [x, *module.parameters()]))
        torch.testing.assert_close(*found)


def test_copies():
    """A module that has run can be copied."""
    (ours, _), x = pair("lstm"), torch.randn(T, B, I)
    ours(x)
    torch.testing.assert_close(copy.deepcopy(ours)(x)[0], ours(x)[0])


def test_threads_of_others():
    """A thread that uses torch for the first time meanwhile gets all threads, and so does the process."""
    seen = []

    def call(x):
        other = threading.Thread(target=lambda: seen.append((torch.get_num_threads(), torch.ones(9).sum().item())))
        other.start()
        other.join()
        seen.append(torch.get_num_threads())
        return (x.square(),)

    cpu.run(1, 1, call, torch.randn(3))
    assert seen == [(2, 9.0), 1] and torch.get_num_threads() == 2


@pytest.mark.filterwarnings("ignore")
def test_compilers_see_the_operations():
    lstm, x = fusedlstm.LSTM(8, 8), torch.randn(5, 2, 8)
    with torch.no_grad():
        compiled = torch.compile(lstm, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], lstm(x)[0])


def test_upper_layers_count(monkeypatch):
    """A wide second layer is not small because the first is."""
    seen = []
    monkeypatch.setattr(cpu, "run", lambda steps, operations, call, *tensors: seen.append(operations) or call(*tensors))
    fusedlstm.LSTM(1, 8, 2, bidirectional=True)(torch.randn(3, 5, 1))
    assert seen == [5 * 32 * (16 + 8)]
