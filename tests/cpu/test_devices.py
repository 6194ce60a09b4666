"""devices.py: the limits of devices in the table and of others, which devices are served, and FUSEDLSTM_SMS."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import fusedlstm
from fusedlstm import __main__ as command_line
from fusedlstm import engines
from fusedlstm.commands import info
from fusedlstm.engines import launch
from fusedlstm.plan import devices, tuned
from fusedlstm.plan.devices import DEVICES


def told(name, major, minor, sms, clock, width, smem=99 << 10, l2=40 << 20, memory=24 << 30, gcn=""):
    """As `torch.cuda.get_device_properties` has it: the clock of the memory in kHz, the width of its bus in bits."""
    return SimpleNamespace(
        name=name,
        major=major,
        minor=minor,
        multi_processor_count=sms,
        memory_clock_rate=clock,
        memory_bus_width=width,
        shared_memory_per_block_optin=smem,
        L2_cache_size=l2,
        total_memory=memory,
        gcnArchName=gcn,
    )


RTX_4090 = told("NVIDIA GeForce RTX 4090", 8, 9, 128, 10501000, 384, l2=72 << 20)
MI210 = told("AMD Instinct MI210", 9, 0, 104, 1600000, 4096, gcn="gfx90a:sramecc+:xnack-")
RX_7900 = told("AMD Radeon RX 7900 XTX", 11, 0, 48, 1250000, 384, gcn="gfx1100")
MI300X = told("AMD Instinct MI300X", 9, 4, 304, 1300000, 8192, gcn="gfx942:sramecc+:xnack-", memory=192 * 10**9)


@pytest.mark.parametrize(
    ("properties", "arch", "data_sheet_tbps"),
    [
        (RTX_4090, "sm_80", 1.008),
        (told("NVIDIA L4", 8, 9, 58, 6251000, 192), "sm_80", 0.300),
        (told("NVIDIA RTX 6000 Ada Generation", 8, 9, 142, 10001000, 384), "sm_80", 0.960),
        (told("NVIDIA A10", 8, 6, 72, 6251000, 384), "sm_80", 0.600),
        (told("NVIDIA H100 PCIe", 9, 0, 114, 1593000, 5120, 227 << 10), "sm_90", 2.04),
        (told("NVIDIA GH200 480GB", 9, 0, 132, 2619000, 6144, 227 << 10), "sm_90", 4.02),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_what_the_table_lacks_the_device_tells(properties, arch, data_sheet_tbps):
    found, first = devices.of_properties(properties, hip=False), DEVICES[arch]
    assert (found.name, found.arch, found.num_sms) == (properties.name, arch, properties.multi_processor_count)
    assert found.memory_tbps == pytest.approx(data_sheet_tbps, rel=0.01)
    assert found.l2_tbps == pytest.approx(first.l2_tbps * found.num_sms / first.num_sms)
    assert (found.smem_bytes, found.l2_bytes) == (properties.shared_memory_per_block_optin, properties.L2_cache_size)
    assert found.memory_bytes == properties.total_memory


@pytest.mark.parametrize("lost", ["memory_clock_rate", "memory_bus_width", "L2_cache_size"])
@pytest.mark.parametrize("how", ["zero", "missing"])
def test_what_the_device_does_not_tell_is_the_first_of_its_arch(lost, how):
    properties = SimpleNamespace(**vars(RTX_4090))
    setattr(properties, lost, 0)
    if how == "missing":
        delattr(properties, lost)
    found = devices.of_properties(properties, hip=False)
    field = "l2_bytes" if lost == "L2_cache_size" else "memory_tbps"
    assert getattr(found, field) == getattr(DEVICES["sm_80"], field)


def test_a_data_sheet_goes_before_a_clock():
    h200 = told("NVIDIA H200", 9, 0, 132, 3201000, 6144, 227 << 10)
    assert devices.of_properties(h200, hip=False).memory_tbps == 4.8
    assert devices.of_properties(MI300X, hip=True).memory_tbps == 5.3


@pytest.mark.parametrize("properties", [MI210, RX_7900], ids=lambda p: p.gcnArchName)
def test_other_amd_devices_are_not_served(monkeypatch, properties):
    """`auto` takes torch, and by name the error says which architecture it is, and which are served."""
    on_gpu(monkeypatch, properties, hip="7.2")
    where = torch.device("cuda", 0)
    arch = properties.gcnArchName.split(":")[0]
    for hidden in (64, None):
        assert engines.choose("auto", where, torch.float16, "lstm", hidden) == "torch"
        with pytest.raises(RuntimeError, match=f"serve NVIDIA .* and AMD gfx942 .*, {properties.name} is {arch}"):
            engines.choose("triton", where, torch.float16, "lstm", hidden)
    assert arch in info.engine_line(where, torch.float16)


@pytest.mark.parametrize(
    ("texts", "name", "arch"),
    [
        (("sm_80", "a100", "A100", "NVIDIA A100-SXM4-80GB"), "NVIDIA A100-SXM4-80GB", "sm_80"),
        (("sm_90", "SM90", "h200"), "NVIDIA H200", "sm_90"),
        (("h100", "H100", "NVIDIA H100 80GB HBM3"), "NVIDIA H100 80GB HBM3", "sm_90"),
        (("sm_100", "b200"), "NVIDIA B200", "sm_100"),
        (("sm_120", "5090", "RTX 5090"), "NVIDIA GeForce RTX 5090", "sm_120"),
        (("gfx942", "mi300x", "MI300X"), "AMD Instinct MI300X", "gfx942"),
        (("4090", "rtx4090", "RTX-4090", "NVIDIA GeForce RTX 4090"), "NVIDIA GeForce RTX 4090", "sm_80"),
        (("sm_86", "a10"), "NVIDIA A10", "sm_80"),
        (("sm_89", "l4"), "NVIDIA L4", "sm_80"),
    ],
    ids=str,
)
def test_a_device_is_found_by_what_people_call_it(texts, name, arch):
    for text in texts:
        found = devices.find(text)
        assert (found.name, found.arch) == (name, arch), text
        assert devices.described(found).startswith(name)
        assert ("scaled from those of NVIDIA A100" in devices.described(found)) == (devices._row(name) is None)


@pytest.mark.parametrize("sheet", devices._SHEETS, ids=lambda sheet: sheet.name)
def test_a_device_found_by_name_is_the_one_that_torch_would_tell(sheet):
    """So that `plan` prints what would run there."""
    clock = round(sheet.memory_tbps * 1e12 * 8 / 256 / 2 / 1e3)
    sizes = {"smem": sheet.smem_kib << 10, "l2": sheet.l2_mib << 20, "memory": sheet.memory_gb * 10**9}
    properties = told(sheet.name, int(sheet.arch[3]), int(sheet.arch[4]), sheet.num_sms, clock, 256, **sizes)
    there = devices.of_properties(properties, hip=False)
    assert dataclasses.replace(there, memory_tbps=sheet.memory_tbps) == devices.find(sheet.name)
    assert there.memory_tbps == pytest.approx(sheet.memory_tbps, rel=1e-4)


@pytest.mark.parametrize("text", ["t4", "Tesla T4", "sm_75", "SM_70", "v100", "gfx90a", "gfx1100", "MI250X"])
def test_a_device_that_is_not_served_says_what_to_do_instead(text):
    with pytest.raises(
        devices.UnsupportedDevice, match=f"compute capability 8.0 .*got '{text}'.*backend='auto' takes torch"
    ):
        devices.find(text)


@pytest.mark.parametrize("text", ["toaster", "", "sm_87", "9.0", "h1000"])
def test_an_unknown_device_is_answered_with_those_that_are_known(text):
    with pytest.raises(ValueError, match=f"arch: expected one of sm_80, sm_86, .*h100.*, got '{text}'"):
        devices.find(text)


def test_a_gfx942_is_served(monkeypatch):
    on_gpu(monkeypatch, MI300X, hip="7.2")
    assert engines.choose("auto", torch.device("cuda", 0), torch.float16, "lstm", 64) == "triton"
    assert launch.device_limits(0).arch == "gfx942"


def on_gpu(monkeypatch, properties, hip=None):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    for cached in (launch._device_limits, launch._cached_plan, tuned._place):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("FUSEDLSTM_SMS", raising=False)
    yield
    for cached in (launch._device_limits, launch._cached_plan, tuned._place):
        cached.cache_clear()


def plan_now(batch=64, hidden=512, directions=1, pass_="fwd", layout="dense", stack=False):
    like, weight_hh = torch.zeros(0, dtype=torch.bfloat16), [torch.empty(4 * hidden, hidden, device="meta")]
    return launch.plan_for("lstm", like, weight_hh, torch.empty(directions, batch, hidden), pass_, layout, stack)


def test_a_cap_is_kept_by_every_plan(monkeypatch):
    """Of loops whose programs wait for each other, waves among them; and it can be changed at any time."""
    whole = plan_now()
    monkeypatch.setenv("FUSEDLSTM_SMS", "40")
    for changes in ({}, {"batch": 1024}, {"directions": 2}, {"pass_": "bwd"}, {"layout": "packed"}, {"stack": True}):
        p = plan_now(**changes)
        assert not p.local and p.grid[0] * p.grid[1] * p.grid[2] <= 40, changes
    assert launch.device_limits(None).num_sms == 40
    monkeypatch.setenv("FUSEDLSTM_SMS", "100000")
    assert plan_now() == whole and launch.device_limits(None) == DEVICES["sm_90"], "more than there are"
    monkeypatch.setenv("FUSEDLSTM_SMS", "")
    assert plan_now() == whole


def test_a_part_of_a_device_is_as_fast_as_its_share():
    part, whole = devices.capped(DEVICES["sm_90"], 33), DEVICES["sm_90"]
    for field in ("half_tflops", "tf32_tflops", "fp32_tflops", "l2_tbps"):
        assert getattr(part, field) == getattr(whole, field) / 4
    assert dataclasses.replace(whole, num_sms=33) == dataclasses.replace(
        part, **{f: getattr(whole, f) for f in ("half_tflops", "tf32_tflops", "fp32_tflops", "l2_tbps")}
    )


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "half", " 12", "٣"])
def test_a_wrong_cap_is_named(monkeypatch, capsys, value):
    monkeypatch.setenv("FUSEDLSTM_SMS", value)
    with pytest.raises(ValueError, match="FUSEDLSTM_SMS: expected a whole number of multiprocessors from 1, got"):
        launch.device_limits(None)
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["plan", "--hidden", "64"])
    assert "plan: error: FUSEDLSTM_SMS: expected" in capsys.readouterr().err


def test_what_was_measured_on_all_is_not_for_a_part(monkeypatch):
    on_gpu(monkeypatch, RTX_4090)
    whole = tuned.place(0)
    monkeypatch.setenv("FUSEDLSTM_SMS", "64")
    assert tuned.place(0) == whole._replace(num_sms=64) != whole
    monkeypatch.setenv("FUSEDLSTM_SMS", "128")
    assert tuned.place(0) == whole
    assert tuned.place(None).num_sms == 128, "the interpreter too"


def test_a_cap_counts_in_the_choice_of_an_engine(monkeypatch):
    """And in how many layers share a launch."""
    call = tuned.Call("lstm", 64, 512, 512, 0, 1, 1, "fp32", "tf32", "dense", True)
    like, hx = torch.zeros(4, 16, 512, dtype=torch.bfloat16), torch.zeros(4, 16, 512)
    whole = engines.fastest(call, None)
    together = launch.layers_together("lstm", like, hx, 4, "dense", True)
    monkeypatch.setenv("FUSEDLSTM_SMS", "33")
    assert engines.fastest(call, None)[1] != whole[1]
    assert launch.layers_together("lstm", like, hx, 4, "dense", True) < together
    plans = [launch.step_plan_for("lstm", torch.zeros(64, 512), 512, 1, 1, 512)]
    monkeypatch.delenv("FUSEDLSTM_SMS")
    plans.append(launch.step_plan_for("lstm", torch.zeros(64, 512), 512, 1, 1, 512))
    assert plans[0].step_us > plans[1].step_us


def test_the_command_line_says_what_may_be_used(monkeypatch, capsys):
    monkeypatch.setenv("FUSEDLSTM_SMS", "12")
    command_line.main(["plan", "--hidden", "512", "--dtype", "bf16"])
    printed = capsys.readouterr().out
    assert "12 of 132 multiprocessors (FUSEDLSTM_SMS)" in printed
    monkeypatch.delenv("FUSEDLSTM_SMS")
    command_line.main(["plan", "--hidden", "512", "--dtype", "bf16"])
    assert "FUSEDLSTM_SMS" not in capsys.readouterr().out


def test_an_lstm_runs_within_a_cap(monkeypatch):
    """A hidden size that no group within the cap holds goes on by launches a step, or is said not to fit."""
    monkeypatch.setenv("FUSEDLSTM_SMS", "1")
    assert plan_now(hidden=4096).schedule == "stepped"
    with pytest.raises(fusedlstm.plan.PlanError, match="1 programs of 227 KiB are too few"):
        plan_now(hidden=4096, layout="packed")
