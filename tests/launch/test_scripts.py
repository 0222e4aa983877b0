"""The launch scripts with stand-ins for what they call (bin/): who is started again, and what signals do."""

import contextlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tarfile
import threading
import time

import pytest
import yaml

from deco_jax.config import load_config
from deco_jax.parallel import processes as distributed

ROOT = pathlib.Path(__file__).parents[2]
BIN = pathlib.Path(__file__).parent / "bin"
SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/gke/*.sh")]
RUN = ["--config", "configs/imagenet256_deco_xl.py", "--workdir", "a folder"]
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_FLAGS", "LIBTPU_INIT_ARGS"))}


@pytest.fixture
def start(tmp_path):
    """Starts a script in a session of its own, the stand-ins in front of PATH; ends what is left of it."""
    processes, timers = [], []

    def start(script, *args, **environment):
        path = {"PATH": f"{BIN}:{os.environ['PATH']}", "FAKE": str(tmp_path), "DECO": str(BIN / "deco"), "PAUSE": "0"}
        path["VERSIONS"] = str(tmp_path / "run" / "versions.txt")
        process = subprocess.Popen(
            ["bash", f"launch/{script}", *args],
            cwd=ROOT,
            env=CLEAN | path | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        timers.append(threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL)))
        timers[-1].start()
        return process

    yield start
    for process, timer in zip(processes, timers, strict=True):
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def end_of(process, timeout=30):
    """(exit code, output)"""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not come")


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def function(name):
    """The environment after a function of common.sh."""
    output = subprocess.run(
        ["bash", "-c", f"source launch/common.sh; {name}; env -0"], cwd=ROOT, env=CLEAN, capture_output=True, text=True
    ).stdout
    return dict(entry.split("=", 1) for entry in output.split("\0") if entry)


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "shellcheck is in the extra `test`: pip install -e .[test]"
    result = subprocess.run(
        [program, "--shell=bash", "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


# The flags.


def accepts(code, **environment):
    """The standard error of a program, "" if it ended well."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=CLEAN | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return "" if result.returncode == 0 else result.stderr


def test_xla_knows_the_flags_for_gpus():
    """XLA ends a program at an unknown flag, on CPUs too. If this fails after an upgrade, take the flag out."""
    code = "import jax; jax.numpy.ones(2) + 1"
    flags = function("gpu_flags")["XLA_FLAGS"]
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags
    assert accepts(code, XLA_FLAGS=flags) == ""
    assert "Unknown flag" in accepts(code, XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=true"), "the check checks nothing"


@pytest.mark.tpu_compiler
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (the extra `tpu`)")
def test_libtpu_knows_the_flags_for_tpus():
    code = """
import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
rows = NamedSharding(Mesh(devices, "x"), PartitionSpec("x"))
matrix = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=rows)
jax.jit(lambda a, b: a @ b, out_shardings=rows).lower(matrix, matrix).compile()
"""
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    flags = function("tpu_flags")["LIBTPU_INIT_ARGS"]
    assert "--xla_tpu_enable_latency_hiding_scheduler=true" in flags
    assert accepts(code, LIBTPU_INIT_ARGS=flags, **alone) == ""
    wrong = accepts(code, LIBTPU_INIT_ARGS=f"{flags} --xla_tpu_no_such_flag=true", **alone)
    assert "Unknown command line flag" in wrong, "the check checks nothing"


@pytest.mark.parametrize("accelerator, variable", [("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")])
def test_own_flags_come_last_and_win(accelerator, variable):
    output = subprocess.run(
        ["bash", "-c", f"source launch/common.sh; {accelerator}_flags; echo ${variable}"],
        cwd=ROOT,
        env=CLEAN | {variable: "--mine=1"},
        capture_output=True,
        text=True,
    ).stdout
    assert output.endswith("=true --mine=1\n")


# One node.


def test_a_node_is_started_again_until_it_finishes(start, tmp_path):
    code, output = end_of(start("gpu_node.sh", *RUN, ENDS="75 1 139 0"))
    assert code == 0, output
    calls = lines(tmp_path / "deco.0")
    assert calls == ["train --config configs/imagenet256_deco_xl.py --workdir a folder"] * 4
    assert "XLA_FLAGS=--xla_gpu" in (tmp_path / "environment.0").read_text()


@pytest.mark.parametrize("end", [2, 126, 127])
def test_what_would_end_the_same_is_not_started_again(start, tmp_path, end):
    """Bad input, and a program that is not there."""
    assert end_of(start("gpu_node.sh", *RUN, ENDS=f"{end} 0"))[0] == end
    assert len(lines(tmp_path / "deco.0")) == 1


def test_a_node_gives_up_and_ends_with_the_programs_code(start, tmp_path):
    code, output = end_of(start("gpu_node.sh", *RUN, ENDS="1 1 134 0", RESTARTS="2"))
    assert code == 134 and "giving up" in output
    assert len(lines(tmp_path / "deco.0")) == 3


@pytest.mark.parametrize("ends", ["wait", "ignore"])
def test_sigterm_reaches_the_program_and_its_end_is_awaited(start, tmp_path, ends):
    process = start("gpu_node.sh", *RUN, ENDS=f"1 {ends} 0")
    wait_for(tmp_path / "waiting.0")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # some send it more than once
    code, output = end_of(process)
    assert code == 0 and "Stopped by SIGTERM" in output
    assert len(lines(tmp_path / "deco.0")) == 2, "it was started again although it was told to stop"


def test_profile_and_cache_on_request(start, tmp_path):
    end_of(start("gpu_node.sh", *RUN, ENDS="0", PROFILE_AT="100", COMPILATION_CACHE=""))
    (call,) = lines(tmp_path / "deco.0")
    options = call.split()[1:3]
    assert options == ["--config.train.profile_at=100", "--config.train.compilation_cache="]
    config = load_config("configs/imagenet256_deco_xl.py", options)
    assert config.train.profile_at == 100 and config.train.compilation_cache == ""


# One host of several: TPU pods and GKE.


@pytest.mark.parametrize("ends", ["0", "2", "75", "1"])
def test_a_host_ends_with_the_programs_code(start, tmp_path, ends):
    assert end_of(start("host.sh", "tpu", *RUN, ENDS=ends))[0] == int(ends)
    assert "LIBTPU_INIT_ARGS=--xla_tpu" in (tmp_path / "environment.0").read_text()


def test_a_host_that_is_told_to_stop_does_not_count_as_finished(start, tmp_path):
    """All processes save and end with 0. If a pod that is taken away did too, its Job would be complete."""
    process = start("host.sh", "gpu", *RUN, ENDS="wait")
    wait_for(tmp_path / "waiting.0")
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 75


# SLURM.


def slurm(start, *args, tasks=2, **environment):
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(os.getpid()), "NTASKS": str(tasks)}
    return start("slurm.sh", *args, **job, **environment)


@pytest.mark.parametrize(
    "job, cpus",
    [
        ({"SLURM_CPUS_PER_TASK": "12"}, 12),
        ({"SLURM_CPUS_ON_NODE": "128", "SLURM_NTASKS_PER_NODE": "8"}, 16),  # --exclusive
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}, 1),  # neither
    ],
)
def test_slurm_starts_every_task_with_its_cpus(start, tmp_path, job, cpus):
    code, output = end_of(slurm(start, *RUN, ENDS="0", **job))
    assert code == 0 and ("starve its data workers" in output) == (cpus == 1)
    for rank in "01":
        environment = (tmp_path / f"environment.{rank}").read_text()
        assert "XLA_FLAGS=--xla_gpu" in environment and f"SRUN_CPUS_PER_TASK={cpus}\n" in environment
    assert not (tmp_path / "scontrol").exists(), "a finished run went back into the queue"


def test_slurm_requeues_what_was_stopped(start, tmp_path):
    """Near the time limit the script alone gets SIGTERM; it must reach the tasks, not through srun, which kills."""
    process = slurm(start, *RUN, ENDS="wait")
    wait_for(tmp_path / "waiting.0")
    wait_for(tmp_path / "waiting.1")
    process.send_signal(signal.SIGTERM)
    code, output = end_of(process)
    assert code == 0 and output.count("Stopped by SIGTERM") == 2, output
    assert lines(tmp_path / "scancel") == [f"--signal=TERM --quiet {os.getpid()}"]
    assert lines(tmp_path / "scontrol") == [f"requeue {os.getpid()}"]
    assert len(lines(tmp_path / "deco.0")) == 1


def test_slurm_does_not_requeue_what_was_cancelled(start, tmp_path):
    process = slurm(start, *RUN, ENDS="wait", JOB_STATE="CANCELLED")
    wait_for(tmp_path / "waiting.0")
    wait_for(tmp_path / "waiting.1")
    process.send_signal(signal.SIGTERM)
    end_of(process)
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("ends, code, starts", [("75 0", 0, 2), ("2 0", 2, 1), ("127 0", 127, 1), ("1 1 1 0", 1, 3)])
def test_slurm_restarts_within_the_allocation(start, tmp_path, ends, code, starts):
    assert end_of(slurm(start, *RUN, ENDS=ends, RESTARTS="2"))[0] == code
    assert len(lines(tmp_path / "deco.0")) == starts
    assert not (tmp_path / "scontrol").exists()


def test_slurm_outside_the_repository(start, tmp_path):
    code, output = end_of(start("slurm.sh", *RUN, SLURM_SUBMIT_DIR=str(tmp_path)))
    assert code == 2 and "submit from there" in output


def test_slurm_script_asks_for_what_it_needs():
    text = (ROOT / "launch/slurm.sh").read_text()
    options = dict(re.match(r"#SBATCH --([a-z-]+)=?(.*)", x).groups() for x in text.splitlines() if "#SBATCH" in x)
    assert "requeue" in options and options["open-mode"] == "append"
    assert re.fullmatch(r"B:TERM@\d+", options["signal"])
    assert options["gpus-per-node"] == options["ntasks-per-node"], "one task per GPU"
    first_command = next(i for i, x in enumerate(text.splitlines()) if not x.startswith("#"))
    assert not any("#SBATCH" in x for x in text.splitlines()[first_command:]), "sbatch does not read these"


@pytest.mark.slow
def test_two_real_processes_stop_and_are_requeued(start, tmp_path):
    """The program itself as two tasks; the stand-ins are srun, scancel and scontrol."""
    run = ["--config", "tests/launch/tiny.py", "--workdir", str(tmp_path / "run"), "--config.train.log_every=1"]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["DECO"] = str(tmp_path / "program")
    (tmp_path / "program").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m deco_jax "$@"\n')
    (tmp_path / "program").chmod(0o755)
    process = slurm(start, *run, "--config.train.steps=1000000", **environment)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    code, rest = end_of(process, 120)
    assert code == 0, output + rest
    assert re.search(r"Stopped by .*; step \d+ is saved", rest), output + rest
    assert lines(tmp_path / "scontrol") == [f"requeue {os.getpid()}"]


# The document's own example.


@pytest.mark.slow
def test_two_processes_as_the_document_starts_them(tmp_path):
    """Its commands as they stand there, but for the program, the workdir, the port, and how long it trains."""
    text = (ROOT / "docs/launch.md").read_text()
    section = text.partition("## Two processes on one machine\n")[2].partition("\n## ")[0]
    command = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, run = f"{shlex.quote(sys.executable)} -m deco_jax", f"{tmp_path}/run --config.train.steps=4"
    for old, new in ((".venv/bin/deco", program), ("runs/two", run), ("8476", str(port))):
        assert old in command, f"the example has no {old} any more"
        command = command.replace(old, new)
    environment = CLEAN | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    for id in (0, 1):
        assert f"Processes: coordinator 127.0.0.1:{port}, process {id} of 2." in done.stdout, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout and (tmp_path / "run/checkpoints/4/_CHECKPOINT_METADATA").is_file(), (
        done.stdout + done.stderr
    )


# Cloud TPUs.

POD = {"TPU": "xl", "ZONE": "europe-west4-a", "TYPE": "v6e-64"}


def asked(tmp_path, verb):
    return [x for x in lines(tmp_path / "gcloud") if f" {verb} " in x]


def test_pod_gets_a_tpu_and_runs_on_all_hosts(start, tmp_path):
    code, output = end_of(start("tpu_pod.sh", *RUN, **POD, ENDS="0", PROFILE_AT="100"))
    assert code == 0, output
    (create,) = asked(tmp_path, "create")
    assert "--accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --spot" in create
    assert all("--worker=all" in x or "pip freeze" in x for x in asked(tmp_path, "ssh") + asked(tmp_path, "scp"))
    (command,) = lines(tmp_path / "runs")
    assert shlex.split(command)[-8:] == ["PROFILE_AT=100", "bash", "launch/host.sh", "tpu", *RUN]
    prepare = (tmp_path / "prepare").read_text()
    assert 'make_venv ".[tpu,gcs,t2i]"' in prepare and "PYTHON=$(~/.local/bin/uv python find 3.12)" in prepare
    with tarfile.open(tmp_path / "deco_jax.tar.gz") as archive:
        assert "launch/quickstart.sh" in archive.getnames()
    assert not asked(tmp_path, "delete"), "the TPU is the user's to delete"


def test_pod_goes_where_it_is_told(start, tmp_path):
    where = {"PROJECT": "p", "NETWORK": "n", "SUBNETWORK": "s", "SERVICE_ACCOUNT": "a@p.iam", "CAPACITY": "--reserved"}
    code, output = end_of(start("tpu_pod.sh", *RUN, **POD | {"TYPE": "tpu7x-64"}, **where, ENDS="0"))
    assert code == 0, output
    (create,) = asked(tmp_path, "create")
    assert create.endswith(
        "--accelerator-type=tpu7x-64 --runtime-version=v2-alpha-tpu7-ubuntu2404 --network=n --subnetwork=s "
        "--service-account=a@p.iam --scopes=https://www.googleapis.com/auth/cloud-platform --reserved"
    )
    assert set(lines(tmp_path / "project")) == {"p"}, "every call is for that project"


def test_pod_reuses_a_tpu(start, tmp_path):
    (tmp_path / "request").write_text("ACTIVE")
    (tmp_path / "node").write_text("READY")
    assert end_of(start("tpu_pod.sh", *RUN, **POD, ENDS="0"))[0] == 0
    assert not asked(tmp_path, "create")


def test_pod_replaces_a_preempted_tpu(start, tmp_path):
    code, output = end_of(start("tpu_pod.sh", *RUN, **POD, ENDS="preempt preempt 0", RESTARTS="0"))
    assert code == 0 and output.count("was preempted") == 2, output
    assert len(asked(tmp_path, "create")) == 3 and len(asked(tmp_path, "delete")) == 2
    assert len(set(lines(tmp_path / "runs"))) == 1, "the same command resumes"
    assert (tmp_path / "run/versions.txt").read_text() == (tmp_path / "versions.txt").read_text() == "jax==0.11.2\n"
    copied = [x.split()[4] for x in asked(tmp_path, "scp") if "versions" in x]
    assert copied == [str(tmp_path / "run/versions.txt")] * 2, "what the first one got, to each that replaced one"
    assert len([x for x in asked(tmp_path, "ssh") if "pip freeze" in x]) == 1
    assert "export PIP_CONSTRAINT=$(realpath ../versions.txt)" in (tmp_path / "prepare").read_text()


def test_pod_asks_for_a_bounded_number_of_tpus(start, tmp_path):
    code, output = end_of(start("tpu_pod.sh", *RUN, **POD, ENDS="preempt preempt 0", REPLACEMENTS="1"))
    assert code == 1 and "giving up" in output
    assert len(asked(tmp_path, "create")) == 2


@pytest.mark.parametrize("ends, code, runs", [("75 1 0", 0, 3), ("2 0", 2, 1), ("127 0", 127, 1), ("1 1 1 1 0", 1, 4)])
def test_pod_restarts_a_crashed_run_on_the_same_tpu(start, tmp_path, ends, code, runs):
    assert end_of(start("tpu_pod.sh", *RUN, **POD, ENDS=ends, RESTARTS="3"))[0] == code
    assert len(lines(tmp_path / "runs")) == runs
    assert len(asked(tmp_path, "create")) == 1 and not asked(tmp_path, "delete")


def test_pod_deletes_nothing_while_gcloud_cannot_say(start, tmp_path):
    code, output = end_of(start("tpu_pod.sh", *RUN, **POD, ENDS="blind 0"))
    assert code == 0 and "is UNKNOWN" in output, output
    assert len(asked(tmp_path, "create")) == 1 and not asked(tmp_path, "delete")


def test_pod_tells_the_hosts_to_stop(start, tmp_path):
    process = start("tpu_pod.sh", *RUN, **POD, ENDS="wait")
    wait_for(tmp_path / "waiting")
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 0
    assert len(lines(tmp_path / "runs")) == 1
    assert "pkill -TERM -x deco" in lines(tmp_path / "gcloud")[-1]


# GKE.


def jobset(file):
    """The manifest with its variables filled in, its pod, and the environment of its container."""
    text = (ROOT / "launch/gke" / file).read_text()
    header = " ".join(line for line in text.splitlines() if line.startswith("#"))
    (exports,) = re.findall(r"export (.*?PROFILE_AT=)", header)
    names = re.findall(r"(\w+)=", exports)
    filled = string.Template(text).substitute(
        {
            name: "2" if name in ("HOSTS", "CHIPS", "SLICES", "NODES", "DATA_CACHE") else f"my-{name.lower()}"
            for name in names
        }
    )
    manifest = yaml.safe_load(filled)
    (job,) = manifest["spec"]["replicatedJobs"]
    return manifest, job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("file", ["tpu.yaml", "gpu.yaml"])
def test_jobset_restarts_all_but_bad_input(file):
    manifest, pod = jobset(file)
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = manifest["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert (
        job["backoffLimit"] == 0
        and job["completionMode"] == "Indexed"
        and job["parallelism"] == job["completions"] == 2
    )
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 126, 127]
    (container,) = pod["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("file", ["tpu.yaml", "gpu.yaml"])
def test_jobset_starts_a_run_that_exists(file):
    _, pod = jobset(file)
    (container,) = pod["containers"]
    shell, script, accelerator = container["command"]
    assert shell == "bash" and (ROOT / script).is_file() and accelerator == file.removesuffix(".yaml")
    arguments = dict(x.split("=", 1) for x in container["args"])
    assert arguments.pop("--workdir") == "gs://my-bucket/my-name"
    path = arguments.pop("--config")
    config = load_config(str(ROOT / path), [f"{k}={v}" for k, v in arguments.items()])
    assert config.teacher.cache == "gs://my-bucket/teacher"
    mounts = {m["name"]: m for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert config.data.path.startswith(mounts["data"]["mountPath"])


@pytest.mark.parametrize("file", ["tpu.yaml", "gpu.yaml"])
def test_data_are_mounted_with_caches(file):
    """What is written goes to the bucket itself: cached answers would hide it from other hosts."""
    _, pod = jobset(file)
    (container,) = pod["containers"]
    mounts = {m["name"]: m for m in container["volumeMounts"]}
    (csi,) = [v["csi"] for v in pod["volumes"] if "csi" in v]
    assert csi["driver"] == "gcsfuse.csi.storage.gke.io" and csi["readOnly"] and mounts["data"]["readOnly"]
    attributes = csi["volumeAttributes"]
    assert all(isinstance(value, str) for value in attributes.values()), "Kubernetes takes strings only"
    options = attributes["mountOptions"].split(",")
    assert attributes["fileCacheCapacity"] == "2" and "file-cache:cache-file-for-range-read:true" in options
    assert all(re.fullmatch(r"implicit-dirs|(metadata|file)-cache:[a-z-]+:(-1|true)", option) for option in options)


def test_a_pod_has_the_chips_of_its_host():
    _, pod = jobset("tpu.yaml")
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 2}


def test_gpu_pods_find_each_other():
    """As kubectl and the JobSet controller would fill it in, the program decides for an explicit coordinator."""
    manifest, pod = jobset("gpu.yaml")
    (job,) = manifest["spec"]["replicatedJobs"]
    environment = {e["name"]: e.get("value", "1") for e in pod["containers"][0]["env"]}
    assert environment.keys() >= set(distributed.COORDINATOR)
    index = next(e for e in pod["containers"][0]["env"] if e["name"] == "JAX_PROCESS_ID")
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    decision = distributed.decide(environment, tpu_vm=False)
    name = manifest["metadata"]["name"]
    assert decision.arguments["coordinator_address"] == f"{name}-{job['name']}-0-0.{name}:8476"
    assert (decision.arguments["num_processes"], decision.arguments["process_id"]) == (
        job["template"]["spec"]["completions"],
        1,
    )
    assert job["replicas"] == 1, "process ids are indexes within one Job"


def test_tpu_pods_leave_it_to_the_webhook():
    _, pod = jobset("tpu.yaml")
    names = {e["name"] for e in pod["containers"][0]["env"]}
    assert not names & set(distributed.COORDINATOR), "an explicit coordinator would win over the webhook's variables"


def test_image_has_what_the_pods_run():
    text = (ROOT / "launch/gke/Dockerfile").read_text()
    assert 'pip install --no-cache-dir --editable ".[${EXTRA},gcs]"' in text and "DECO=deco" in text
    assert re.search(r"^FROM python:3\.\d+\.\d+-", text, re.MULTILINE), "a build next year takes the same image"
