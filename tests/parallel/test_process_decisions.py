"""Who a process thinks it is, from its environment; what an error means for a run of several processes."""

import jax
import pytest

from deco_jax.errors import AgreedError, AgreedTransient, TransientError, UsageError
from deco_jax.parallel import hardware, processes

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
COORDINATOR = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def test_a_laptop_is_a_single_process():
    assert processes.decide({}, tpu_vm=False) == processes.Decision("a single process", None)
    assert processes.decide({**SLURM, "SLURM_NTASKS": "1"}, tpu_vm=False).arguments is None
    batch_script = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}  # outside of srun there is no step
    assert processes.decide(batch_script, tpu_vm=False).arguments is None


def test_an_explicit_coordinator_wins():
    decision = processes.decide({**SLURM, **COORDINATOR, "JOBSET_NAME": "xl"}, tpu_vm=True)
    assert decision.text == "coordinator 10.0.0.1:1234 (JobSet xl), process 3 of 4"
    assert decision.arguments == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_NUM_PROCESSES=4 and JAX_PROCESS_ID=4"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1 must be HOST:PORT"),
    ],
)
def test_an_incomplete_coordinator_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        processes.decide({**COORDINATOR, **change}, tpu_vm=False)


@pytest.mark.parametrize(
    "change, gpus",
    [
        ({}, None),  # no GPUs
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [1]),  # one task per GPU, all visible
        ({"CUDA_VISIBLE_DEVICES": "5"}, [0]),  # SLURM has given each its own
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [2, 3]),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "4", "SLURM_STEP_TASKS_PER_NODE": "2"},
            [0, 1, 2, 3],
        ),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_NODEID": "1"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, [0, 1, 2, 3]),
    ],
)
def test_a_slurm_task_uses_its_share_of_the_gpus(change, gpus):
    """Guards against jax's default, which leaves all but one GPU of a node idle where it has a single task."""
    decision = processes.decide({**SLURM, **change}, tpu_vm=False)
    assert decision.text == "SLURM job 7, task 5 of 8"
    assert decision.arguments == {"cluster_detection_method": "slurm", "local_device_ids": gpus}


def test_tpus():
    gke = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
    assert processes.decide(gke, tpu_vm=True).text == "TPU on GKE, host 1 of 2, 1 slice(s)"
    one_host = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert processes.decide(one_host, tpu_vm=True).arguments is None
    assert processes.decide({**one_host, "MEGASCALE_NUM_SLICES": "2"}, tpu_vm=True).arguments == {}
    assert processes.decide({}, tpu_vm=True).arguments == {}
    assert processes.decide({"TPU_SKIP_MDS_QUERY": "1"}, tpu_vm=True).arguments is None


@pytest.mark.parametrize("devices, has", [({}, False), ({"0x0042"}, False), ({"0x001f", "0x0063"}, True)])
def test_a_machine_of_google_without_a_tpu(tmp_path, monkeypatch, devices, has):
    """Its network card and disks are Google's as well."""
    monkeypatch.setattr(hardware, "PCI", tmp_path)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    for device in devices:
        (tmp_path / device).mkdir()
        (tmp_path / device / "vendor").write_text("0x1ae0\n")
        (tmp_path / device / "device").write_text(f"{device}\n")
    assert hardware.has_tpu() is has


def test_an_error_is_the_others_only_if_it_says_so():
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:43175")
    assert processes.broken_run(gone).code == 75
    assert processes.broken_run(ValueError("UNKNOWN: Gloo AllGather failed: Read error")).code == 75
    assert processes.broken_run(UsageError("data.path=x")).code == 2
    assert processes.broken_run(ValueError("a bug")).code == 1
    assert processes.broken_run(ConnectionResetError("Connection reset by storage")).code == 75  # it may pass
    assert "another process" not in str(processes.broken_run(ConnectionResetError("Connection reset by storage")))
    assert processes.broken_run(KeyboardInterrupt()).code == 130


def test_what_is_agreed_on_is_told_to_all(monkeypatch):
    """With the exchange replaced: of three processes, the last found a mistake."""
    monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes, "allgather", lambda text: [text, "", "data.path=/x is no folder."])
    with pytest.raises(AgreedError, match=r"process 2 stopped: data.path=/x is no folder\."):
        processes.agree(lambda: "fine here")
    with pytest.raises(AgreedError, match="mine"):
        processes.agree(lambda: (_ for _ in ()).throw(UsageError("mine")))
    monkeypatch.setattr(processes, "allgather", lambda text: [text, f"{processes.PASSES}reading /x still fails", ""])
    with pytest.raises(AgreedTransient, match="process 1 stopped: reading /x still fails"):
        processes.agree(lambda: "fine here")
    with pytest.raises(AgreedTransient, match="^mine$"):
        processes.agree(lambda: (_ for _ in ()).throw(TransientError("mine")))
    with pytest.raises(AgreedError, match="^mine$"):  # bad input stays so when it is tried again
        processes.agree(lambda: (_ for _ in ()).throw(UsageError("mine")))
    with pytest.raises(ZeroDivisionError):
        processes.agree(lambda: 1 / 0)
    monkeypatch.setattr(processes, "allgather", lambda text: [text, "", "data.path=/x is no folder."])
    with pytest.raises(AgreedError, match="the seed of process 1 is , of process 0 7"):
        processes.assert_equal("the seed", "7")
