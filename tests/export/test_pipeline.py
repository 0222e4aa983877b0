"""An exported folder works with diffusers, without this project."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from deco_jax.export.diffusers_folder import diffusers_files
from tests.helpers import Golden, relative_error

DOCS = pathlib.Path(__file__).parents[2] / "docs/pytorch.md"
EXTRA = "needs the extra `torch`"

# Runs in the folder's parent, where `xl` is the folder; deco_jax and jax cannot be imported there.
PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(["deco_jax", "jax", "flax"]))
import numpy as np

exec(open("docs.py").read())  # defines pipe and images
np.save("docs.npy", np.stack([np.asarray(image) for image in images]))

recorded = np.load("recorded.npz")
images = pipe(
    class_labels=recorded["condition"].tolist(), latents=torch.tensor(recorded["noise"]),
    num_inference_steps=12, guidance_scale=3.2, guidance_interval=(0.1, 1.0), output_type="pt",
).images
np.save("recorded.npy", images.numpy())

seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
both = pipe([1, 2], generator=seeds, num_inference_steps=2, height=16, width=24, output_type="np", return_dict=False)
alone = pipe(2, generator=seeds[1].manual_seed(4), num_inference_steps=2, height=16, width=24, output_type="np")
np.savez("seeds.npz", both=both[0], alone=alone.images)

for arguments in (
    {}, {"class_labels": [1], "prompt_embeds": torch.zeros(1)}, {"class_labels": [1], "output_type": "x"}
):
    try:
        pipe(**arguments)
    except ValueError as error:
        print("refused:", error)

half = DiffusionPipeline.from_pretrained("xl", trust_remote_code=True).to(torch.bfloat16)
print("dtypes:", pipe.dtype, half.dtype, half([1], num_inference_steps=1).images[0].size)
"""


def test_the_files_of_a_folder():
    files = diffusers_files(image_size=512)
    assert files.keys() == {"pipeline.py", "transformer/torch_model.py", "model_index.json"}
    index = json.loads(files["model_index.json"])
    assert index["image_size"] == 512
    module, name = index["_class_name"]
    assert f"class {name}(DiffusionPipeline)" in files[f"{module}.py"]
    module, name = index["transformer"]
    assert f"class {name}(nn.Module)" in files[f"transformer/{module}.py"]
    assert not re.search(r"^\s*(from|import) (deco_jax|\.)", "\n".join(files.values()), re.MULTILINE)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Where PROGRAM ran and left its arrays, and what it printed."""
    pytest.importorskip("torch", reason=EXTRA)
    pytest.importorskip("diffusers", reason=EXTRA)
    save_file = pytest.importorskip("safetensors.numpy", reason=EXTRA).save_file
    parent = tmp_path_factory.mktemp("pipeline")
    for name, text in diffusers_files(image_size=32).items():
        path = parent / "xl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tensors = Golden("deco_c2i").group("param:")
    # The docs ask for ImageNet's classes; ten of them have weights here.
    table = "y_embedder.embedding_table.weight"
    tensors[table] = np.concatenate([tensors[table][:10], np.zeros((990, 32), np.float32), tensors[table][10:]])
    save_file(tensors, parent / "xl/model.safetensors")
    (parent / "xl/config.json").write_text(json.dumps({"width": 32}))
    np.savez(parent / "recorded.npz", **Golden("sample_deco_c2i").group(""))
    _, code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert "num_inference_steps=100" in code
    (parent / "docs.py").write_text(code.replace("num_inference_steps=100", "num_inference_steps=4"))
    environment = os.environ | {"HF_HOME": str(parent / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", PROGRAM],
        cwd=parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return parent, run.stdout


def test_the_docs_example_makes_two_images(sampled):
    parent, _ = sampled
    images = np.load(parent / "docs.npy")
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 10
    assert (parent / "207.png").exists()


def test_samples_equal_the_recorded_ones(sampled):
    parent, _ = sampled
    recorded = np.clip((Golden("sample_deco_c2i")["samples"] + 1) / 2, 0, 1)
    assert relative_error(np.load(parent / "recorded.npy"), recorded) < 2e-5


def test_an_image_depends_on_its_own_generator_only(sampled):
    parent, _ = sampled
    images = np.load(parent / "seeds.npz")
    assert images["both"].shape == (2, 16, 24, 3)
    np.testing.assert_allclose(images["both"][1:], images["alone"], atol=1e-5)


def test_bad_arguments_are_named_and_dtypes_are_followed(sampled):
    _, output = sampled
    assert output.count("refused: give either class_labels or prompt_embeds.") == 2
    assert "refused: output_type='x' is not known; allowed: pil, np, pt." in output
    assert "dtypes: torch.float32 torch.bfloat16 (32, 32)" in output
