"""What a stage is said to have used: its growth in memory, all of its attempts, energy over the counter's wraps."""

import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from mft_core.recipes import Evaluate, Runtime
from mft_core.sandbox import limited
from mft_core.stage import Stage
from mft_core.store import usage
from mft_core.store.artifacts import ArtifactStore
from mft_core.store.kept import keep
from mft_core.store.usage import KEPT, Meter


def test_memory_is_what_was_added_while_the_work_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "SAMPLE_SECONDS", 0.01)
    with Meter(tmp_path) as meter:
        held = bytearray(b"1") * 80_000_000
        time.sleep(0.1)
        del held
    used = meter.used
    assert 70e6 < used["peak_memory_bytes"] < 200e6
    assert used["alone"]
    assert "cores" in used["device"]


@pytest.mark.parametrize("reached", [(), ("cuda",)])
def test_a_stage_that_is_measured_while_another_thread_imports_torch_is_not_lost(tmp_path, monkeypatch, reached):
    half = ModuleType("torch")
    for name in reached:
        setattr(half, name, ModuleType(f"torch.{name}"))
    monkeypatch.setitem(sys.modules, "torch", half)
    monkeypatch.setattr(usage, "SAMPLE_SECONDS", 0.01)
    with Meter(tmp_path) as meter:
        time.sleep(0.05)
    assert "cores" in meter.used["device"]


def test_a_fork_holds_what_this_process_holds_and_a_program_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "SAMPLE_SECONDS", 0.01)
    held = bytearray(b"1") * 80_000_000
    with Meter(tmp_path) as meter:
        limited("a template", lambda: time.sleep(0.3))
    assert meter.used["peak_memory_bytes"] < 40e6 < len(held)
    program = "import time; held = bytearray(b'1') * 80_000_000; time.sleep(0.3)"
    with Meter(tmp_path / "other") as meter:
        subprocess.run([sys.executable, "-c", program], check=True)
    assert meter.used["peak_memory_bytes"] > 70e6


def test_an_attempt_that_failed_counts_too(tmp_path):
    keep(tmp_path / KEPT, {"seconds": 100.0, "peak_memory_bytes": 10**12, "energy_joules": None, "alone": True})

    def fail():
        with Meter(tmp_path):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    with Meter(tmp_path) as meter:
        pass
    used = meter.used
    assert 100 < used["seconds"] < 130
    assert used["peak_memory_bytes"] == 10**12
    assert used["energy_joules"] is None, "of an attempt without a counter nothing is known of the whole"


def test_work_beside_other_work_is_not_alone(tmp_path):
    inside, leave = threading.Event(), threading.Event()
    others = []

    def other():
        (tmp_path / "other").mkdir()
        with Meter(tmp_path / "other") as meter:
            inside.set()
            leave.wait(10)
        others.append(meter)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with Meter(tmp_path) as meter:
        leave.set()
        thread.join()
    with Meter(tmp_path / "other") as later:
        pass
    assert not meter.used["alone"]
    assert not others[0].used["alone"]
    assert not later.used["alone"], "its first attempt was not"


def test_a_counter_that_wraps_goes_on_counting(tmp_path, monkeypatch):
    package = tmp_path / "intel-rapl:0"
    for folder in (package, tmp_path / "intel-rapl:0:0"):
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text("10000000\n")
        (folder / "energy_uj").write_text("9000000\n")
    monkeypatch.setattr(usage, "_RAPL", tmp_path)
    (counter,) = usage.cpu_counters()
    for microjoules in (9_500_000, 250_000, 1_000_000):
        (package / "energy_uj").write_text(f"{microjoules}\n")
        counter.sample()
    assert counter.joules == pytest.approx(2.0)


def test_where_nothing_can_be_read_there_is_no_energy(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "_RAPL", tmp_path / "nothing")
    with Meter(tmp_path) as meter:
        pass
    assert meter.used["energy_joules"] is None


class NVMLError(Exception):
    """As that of `pynvml`, which is not among the tested packages."""


@pytest.mark.parametrize(
    ("fails", "readings"),
    [
        pytest.param("nvmlInit", 0, id="without libnvidia-ml"),
        pytest.param("nvmlDeviceGetHandleByUUID", 0, id="a MIG slice"),
        pytest.param("nvmlDeviceGetTotalEnergyConsumption", 0, id="before Volta"),
        pytest.param("nvmlDeviceGetTotalEnergyConsumption", 1, id="lost meanwhile"),
    ],
)
def test_a_gpu_that_does_not_tell_its_energy_costs_no_result(tmp_path, monkeypatch, caplog, fails, readings):
    cuda = SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 1, memory_reserved=lambda index: 1,
        get_device_properties=lambda index: SimpleNamespace(uuid="x"), max_memory_allocated=lambda: 5,
        get_device_name=lambda: "A100 MIG", reset_peak_memory_stats=lambda: None,
    )  # fmt: skip
    calls = []

    def answer(name):
        calls.append(name)
        if name == fails and calls.count(name) > readings:
            raise NVMLError(f"Not Supported by {fails} after {readings}")
        return 1

    names = ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"]
    nvml = {name: lambda *_, name=name: answer(name) for name in names}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**nvml))
    monkeypatch.setattr(usage, "SAMPLE_SECONDS", 0.01)

    def run(recipe, inputs, out, context):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        (out / "one.txt").write_text("hours of work")
        time.sleep(0.1)
        return {}

    store = ArtifactStore(tmp_path)
    for task in ("a", "b"):
        stage = Stage("evaluate", 1, Evaluate, heavy=True, needs=lambda *_: 1 / 0, load=lambda: run)
        built = store.build(stage, Evaluate(task=task), {}, Runtime())
        assert (built.ref.local_path(store) / "one.txt").read_text() == "hours of work"
        assert built.manifest["provenance"]["energy_joules"] is None
        assert built.manifest["provenance"]["device"] == "A100 MIG"
    assert caplog.text.count("Not Supported") == 1
