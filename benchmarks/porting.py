"""What does it take to open an XL-size checkpoint of upstream's? Prints the table of docs/numbers.md.

  python benchmarks/porting.py [OUTPUT.json]

Writes a Lightning `.ckpt` of DeCo-XL's names and shapes with random numbers (10.9 GB: online, EMA, AdamW's moments)
into the temporary folder, with torch; then opens it in processes of their own that have no torch in them.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

SHAPES = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "full_size_state_dict_shapes.json"
CHILD = """
import json, resource, sys, threading, time
import jax
from deco_jax import load_pretrained
jax.device_put(1.0).block_until_ready()

def memory():  # bytes of this process in RAM: its own, and the pages of files that it maps
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}

before, peak, done = memory(), memory(), False

def watch():
    while not done:
        for name, size in memory().items():
            peak[name] = max(peak[name], size)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
model, params = load_pretrained(sys.argv[1], sys.argv[2])
jax.block_until_ready(params)
seconds, done = time.perf_counter() - start, True
assert "torch" not in sys.modules
size = sum(x.size * 4 for x in jax.tree.leaves(params))
print(json.dumps({"seconds": seconds, "part": size, **{n: peak[n] - before[n] for n in peak}}))
"""


def write(path):
    import torch

    shapes = json.loads(SHAPES.read_text())["deco_xl"]
    state, moments = {}, {}
    for prefix in ("denoiser.", "ema_denoiser."):
        state |= {prefix + name: torch.randn(shape) for name, shape in shapes.items()}
    for number, shape in enumerate(shapes.values()):
        moments[number] = {"step": torch.tensor(1.0), "exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape)}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": list(moments)}]
    optimizer = [{"state": moments, "param_groups": groups}]
    torch.save({"epoch": 1, "global_step": 1, "state_dict": state, "optimizer_states": optimizer}, path)


def main():
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "xl.ckpt"
        write(path)
        for weights in ("ema", "online"):
            done = subprocess.run([sys.executable, "-c", CHILD, path, weights], stdout=subprocess.PIPE, check=True)
            rows[f"open {weights}"] = json.loads(done.stdout)
        start = time.perf_counter()
        command = [sys.executable, "-m", "deco_jax", "convert", path, path.with_name("xl.safetensors")]
        subprocess.run(command, check=True)
        rows["convert to safetensors"] = {"seconds": time.perf_counter() - start}
        print(f"File: {path.stat().st_size / 1e9:.2f} GB")
    print("| | seconds | part, GB | memory at most, GB | of the part |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row['seconds']:.1f}"]
        if "part" in row:
            cells += [f"{row[k] / 1e9:.2f}" for k in ("part", "VmRSS")] + [f"{row['VmRSS'] / row['part']:.2f}"]
        print(f"| {name} | " + " | ".join(cells + [""] * (4 - len(cells))) + " |")
    with open(sys.argv[1] if len(sys.argv) > 1 else "porting.json", "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
